"""The `bita` command: one subcommand a module; each module has `add_parser(subparsers)`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from bita_vllm import __version__, doctor
from bita_vllm.system.errors import UserError
from bita_vllm.training import data_command, eval_command, shrink_command, train_command
from bita_vllm.tuning import tune_command

SUBCOMMANDS = (
    data_command,
    train_command,
    shrink_command,
    eval_command,
    tune_command,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; returns the exit code. What a user can put right is one sentence (`UserError`)."""
    # vLLM logs to stdout by default; that is where our own output goes.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args = make_parser().parse_args(argv)
    ended_by = signal.SIGINT
    try:
        with _sigterm_as_interrupt():
            return args.run(args)
    except _Terminated:
        ended_by = signal.SIGTERM
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"bita: {error}", file=sys.stderr)
        return 1
    # what a command does not expect: no place for scratch files, no such terminal
    except OSError as error:
        print(f"bita: The system refused what was needed ({error}).", file=sys.stderr)
        return 1
    print(
        f"bita: Ended by {ended_by.name}; what is written is whole, and nothing half done stays.",
        file=sys.stderr,
    )
    return 128 + ended_by


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, so that engines are shut down and scratch files go."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise _Terminated at the first SIGTERM; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there signals can be handled
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; `args.run(args)` runs the one chosen."""
    parser = argparse.ArgumentParser(prog="bita", description="BiTA for vLLM.")
    parser.add_argument("--version", action="version", version=f"bita {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""The `bita` command: one subcommand a module; each module has `add_parser(subparsers)`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from bita_vllm import __version__, doctor
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
    """Run the subcommand; returns the exit code."""
    # vLLM logs to stdout by default; that is where our own output goes.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args = make_parser().parse_args(argv)
    return args.run(args)


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

"""`bita tune`: measures what steps cost on this machine, and chooses rows by load."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bita_vllm.training.base_model import DTYPES

if TYPE_CHECKING:
    from bita_vllm.adapter.config import AdapterConfig
    from bita_vllm.tree.ladder import Ladder
    from bita_vllm.tree.ladder_search import Choice
    from bita_vllm.tree.step_cost import Point
    from bita_vllm.tuning.answers import Answers

# What decides the cost of a step and the acceptance of drafts: of the same, nothing is measured again.
PROFILE_KEYS = (
    "model", "device", "cores", "dtype", "engine_args", "vllm", "torch", "acceptance_statistics"
)  # fmt: skip
# What is timed where nothing else is asked for.
ON_CPU = {"requests": [1, 2, 4, 8, 16], "rows": [4, 8, 16, 32], "steps": 8, "max_num_seqs": 64}
ON_GPU = {
    "requests": [1, 4, 16, 64, 128],
    "rows": [4, 8, 16, 32, 64],
    "steps": 64,
    "max_num_seqs": 256,
}

USUAL_WIDTH = 7  # blocks of 8 rows: of the sizes timed, answers are drafted with the nearest


def add_parser(subparsers: Any) -> None:
    """Add `tune` to the `bita` command."""
    parser = subparsers.add_parser(
        "tune",
        help="choose rows by load for this machine",
        description="Time engine steps on this machine, and choose for every batch size the step block with most "
        "expected tokens a second, plain decoding included. The result, a ladder, is what serving uses by default.",
    )
    add = parser.add_argument
    add("adapter", help="adapter directory")
    add("--model", help="base model (default: the one that the adapter names)")
    add("--revision", help="revision of the model on the hub")
    add("--out", type=Path, help="file of the ladder (default: ladder.json in the adapter)")
    for name, meaning in (
        ("--max-num-seqs", "largest batch size"),
        ("--steps", "steps to time at each point, at least"),
    ):
        add(name, type=int, help=f"{meaning} ({_defaults(name)})")
    for name, meaning in (
        ("--requests", "batch sizes to time; others are interpolated"),
        ("--rows", "rows a request to time, besides 1"),
    ):
        add(name, type=int, nargs="+", help=f"{meaning} ({_defaults(name)})")
    add("--dtype", choices=DTYPES, default="auto", help="of the model (default: auto)")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for vLLM's LLM class")
    add("--again", action="store_true", help="time the steps even if --out has this machine's")
    parser.set_defaults(run=run)


def _defaults(option: str) -> str:
    """For help."""
    key = option[2:].replace("-", "_")
    cpu, gpu = (str(where[key]).strip("[]").replace(",", "") for where in (ON_CPU, ON_GPU))
    return f"default: {cpu} on a CPU, {gpu} on a GPU"


def run(args: argparse.Namespace) -> int:
    """Tune and print; returns the exit code. Raises UserError."""
    ladder, choices, path = tune(args)
    _print_table(ladder, choices)
    print(f"written: {path}")
    return 0


def tune(args: argparse.Namespace) -> tuple[Ladder, list[Choice], Path]:
    """The ladder, what it was chosen by, where it was saved. Raises UserError."""
    from bita_vllm.adapter.checkpoint import resolve_adapter_dir
    from bita_vllm.adapter.config import AdapterConfig
    from bita_vllm.system import platform
    from bita_vllm.training.base_model import choose_dtype
    from bita_vllm.training.data_command import parse_engine_args, require_at_least
    from bita_vllm.training.provenance import portable_name, versions
    from bita_vllm.training.samples import DataError
    from bita_vllm.tree.ladder import LADDER_FILE
    from bita_vllm.tree.ladder_search import choose_ladder, sets_of_budgets
    from bita_vllm.tree.search import MIN_ROWS, acceptance_table, scaled
    from bita_vllm.tree.step_cost import MeasuredCost
    from bita_vllm.tree.template_set import saved_sets
    from bita_vllm.tuning.answers import ANSWER_TOKENS, acceptance_reached

    on_gpu = platform.on_gpu()
    for name, value in (ON_GPU if on_gpu else ON_CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    require_at_least(args, {"max_num_seqs": 1, "steps": 2})
    if min(args.requests) < 1 or min(args.rows) < MIN_ROWS:
        raise DataError(
            f"--requests {args.requests} and --rows {args.rows}: expected at least 1 request and {MIN_ROWS} rows."
        )
    engine_args = parse_engine_args(args)
    adapter_dir = resolve_adapter_dir(args.adapter)
    config = AdapterConfig.load(adapter_dir)
    acceptance = acceptance_table(config.acceptance, config.num_mask_tokens)
    if config.acceptance is None:
        print(
            f"{config.label} has no acceptance statistics; typical ones are taken. Run 'bita eval' first.",
            file=sys.stderr,
        )
    model = args.model or config.verifier
    path = args.out or adapter_dir / LADDER_FILE
    provenance: dict[str, Any] = {
        "model": portable_name(model),
        "device": platform.device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "dtype": args.dtype if on_gpu else choose_dtype(args.dtype, "cpu"),
        "engine_args": engine_args,
        "acceptance_statistics": f"{zlib.crc32(acceptance.tobytes()):08x}",
        **versions(),
    }
    measured = None if args.again else _measured_before(path, provenance)
    if measured is None:
        options = {"revision": args.revision, "dtype": provenance["dtype"], **engine_args}
        measured = _measure(args, model, config, acceptance, options, on_gpu)
    else:
        print(f"step times are taken from {path}; --again times them anew.")
    points, answers = measured
    reached = 1.0
    if answers is not None:
        (templates,) = sets_of_budgets([answers.rows], acceptance, saved_sets(config.acceptance))
        reached = acceptance_reached(acceptance, templates, answers.accepted_length)
        print(
            f"{answers.tokens} tokens of answers, {ANSWER_TOKENS} at most each, came with "
            f"{answers.accepted_length:.2f} a step in blocks of {answers.rows} rows: {reached:.2f} times the "
            "acceptance in the adapter's statistics."
        )
    provenance |= {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "acceptance": "typical" if config.acceptance is None else "of the adapter",
        "acceptance_reached": reached,
        "answers": answers and list(answers),
        "step_seconds": [list(point) for point in points],  # `tree.step_cost.Point`
    }
    ladder, choices = choose_ladder(
        scaled(acceptance, reached),
        MeasuredCost(points),
        args.max_num_seqs,
        padded=on_gpu,
        sets=saved_sets(config.acceptance),
        length_spread=0.0 if answers is None else answers.spread,
        provenance=provenance,
    )
    ladder.save(path)
    return ladder, choices, path


def _measured_before(
    path: Path, provenance: Mapping[str, Any]
) -> tuple[Sequence[Point], Answers | None] | None:
    """What was measured for the ladder in that file, if it was measured on the same."""
    from bita_vllm.tree.ladder import Ladder, LadderError, LadderVersionError
    from bita_vllm.tree.step_cost import Point
    from bita_vllm.tuning.answers import Answers

    if not path.is_file():
        return None
    try:
        had = Ladder.load(path).provenance
    except LadderVersionError:
        return None
    except LadderError as error:
        again = "--again writes a new ladder in its place"
        raise LadderError(f"{str(error).rstrip('.')}, where {again}.") from None
    same = all(had.get(key) == provenance[key] for key in PROFILE_KEYS)
    if not same:
        return None
    answers = had.get("answers")
    return [Point(*point) for point in had["step_seconds"]], answers and Answers(*answers)


def _measure(
    args: argparse.Namespace,
    model: str,
    adapter: AdapterConfig,
    acceptance: Any,
    engine_args: Mapping[str, Any],
    on_gpu: bool,
) -> tuple[list[Point], Answers | None]:
    """Every point, and answers at about as many rows as serving has; from an engine of its own."""
    from bita_vllm.training.base_model import start_engine
    from bita_vllm.tree.ladder_search import sets_of_budgets
    from bita_vllm.tree.template_set import saved_sets, templates_of
    from bita_vllm.tuning.answers import longest_answer, serve_answers
    from bita_vllm.tuning.profile import (
        graph_sizes,
        kv_cache_bytes,
        max_model_len,
        profile_ladder,
        profile_steps,
    )

    requests = sorted(set(args.requests))
    saved = saved_sets(adapter.acceptance)
    ladder = profile_ladder(
        sets_of_budgets(sorted(set(args.rows)), acceptance, saved), requests[-1]
    )
    widths, num_rows = ladder.widths, ladder.widest.num_rows
    deepest = max(template.max_depth for template in templates_of(ladder.template_sets))
    longest = max_model_len(len(widths), deepest, num_rows)
    longest = max(longest, longest_answer(num_rows))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profile looks into the scheduler
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        ladder.save(file)
        options = {
            "max_model_len": longest,
            "max_num_seqs": requests[-1] + len(widths),
            "max_num_batched_tokens": max(2048, requests[-1] * num_rows),
            "kv_cache_memory_bytes": kv_cache_bytes(
                adapter.model, requests[-1], longest, 4 if engine_args["dtype"] == "float32" else 2
            ),
            # All that vLLM asks for where KV memory is given: so much must be free.
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            "speculative_config": {
                "method": "bita",
                "model": str(adapter.path),
                "ladder": str(file),
                "copies": False,  # what they bring depends on the texts, and is learnt while serving
            },
            **engine_args,
        }
        if on_gpu and not engine_args.get("enforce_eager"):
            options.setdefault("cudagraph_capture_sizes", graph_sizes(requests, widths))
        with start_engine(model, **options) as llm:
            points = profile_steps(llm, requests, widths, args.steps)
            return points, serve_answers(llm, 1 + min(widths, key=lambda w: abs(w - USUAL_WIDTH)))


def _print_table(ladder: Ladder, choices: list[Choice]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("requests", "rows", "accepted length", "ms/step", "tokens/s", "to plain"):
        table.add_column(name, justify="right")
    for first, last, _ in ladder.batch_sizes:
        for n in sorted({first, last}):
            choice = choices[n - 1]
            table.add_row(
                str(n),
                str(choice.width + 1) if choice.width else "plain",
                f"{choice.accepted_length:.2f}",
                f"{1e3 * choice.seconds:.1f}",
                f"{n * choice.accepted_length / choice.seconds:.1f}",
                f"{choice.gain:.2f} ± {choice.gain * choice.spread:.2f}" if choice.width else "1",
            )
    console = Console()
    console.print(table)
    for templates in ladder.template_sets:
        console.print(templates.describe(), highlight=False)

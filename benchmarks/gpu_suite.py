"""What one wants to know of BiTA on a GPU, in three commands of under nine minutes each: `make gpu-suite`.

tokens      embedded model in bf16, a tiny one in fp32, an fp8 KV cache: every kind of request next to plain vLLM
throughput  output tokens per second compared with plain vLLM at its best, at 1 to 256 requests and with arrivals
steps       `bita tune` of an 8B shape (a ladder for this GPU), kernels compared with their peers, steps by context
training    optional: a training step of an 8B shape

    make gpu-suite ARGS='--plan'
    make gpu-suite ARGS='--part tokens --out results'

A row is on the disk when it is measured, the tables come at the end of a part, and everything is in --out:
at most eight files a part, one of them the log. What does not fit into --limit is left out and named.
`--dry` runs the same code on a CPU through Triton's interpreter: tiny numbers that say nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType

from provenance import ROOT, provenance

PARTS = ("tokens", "throughput", "steps", "training")
BY_DEFAULT = PARTS[:3]
LIMIT = 540  # seconds a part
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"


def module(part: str) -> ModuleType:
    """The part's file."""
    import importlib

    return importlib.import_module(f"gpu.{part}")


def plan(parts: list[str], limit: float) -> str:
    """What would run, how many engines start, and how long it is expected to take on an H100."""
    lines = []
    for part in parts:
        items = module(part).items(dry=False)
        starts, seconds = sum(item.starts for item in items), sum(item.seconds for item in items)
        lines.append(f"{part}: {seconds} s of {limit:.0f} s, {starts} engine starts")
        lines += [f"  {item.seconds:4d} s  {item.starts} starts  {item.name}" for item in items]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=PARTS,
        default=list(BY_DEFAULT),
        help="default: the first three",
    )
    add("--plan", action="store_true", help="print what would run, and for how long; run nothing")
    add(
        "--dry",
        action="store_true",
        help="tiny, interpreted, on a CPU: does every part run to its end?",
    )
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of everything "
        "that is kept (default: benchmarks/results/gpu)")  # fmt: skip
    add(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds that a part may take (default: %(default)s)",
    )
    add("--model", type=Path, help="instead of the embedded model")
    add("--adapter", type=Path, default=ADAPTER, help="its adapter (default: the shipped one)")
    add("--ladder", type=Path, help="of the 8B shape in throughput: what the part 'steps' wrote "
        "(default: bita's own default)")  # fmt: skip
    add("--plain-backend", help="attention backend of plain vLLM (default: vLLM's own choice)")
    add("--scratch", type=Path, help="folder of models and adapters (default: a temporary one)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.plan:
        print(plan(args.part, args.limit))
        return
    facts = {name: value for name, value in provenance().items() if name != "preloaded"}
    if args.dry:
        from testbed import v2_on_cpu

        v2_on_cpu.install()
    else:
        import torch

        facts["device"] = torch.cuda.get_device_name()
        if args.model is None and args.part != ["steps"]:
            from bita_vllm.embedded import embedded_model_dir

            args.model = embedded_model_dir()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix="bita-gpu-suite-") as folder:
        scratch = args.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        for part in args.part:
            failed += run(part, args, scratch, facts)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def run(part: str, args: argparse.Namespace, scratch: Path, facts: dict) -> list[str]:
    """A part to its end; returns what failed."""
    from gpu.machine import Machine

    plain = {"attention_backend": args.plain_backend} if args.plain_backend else {}
    machine = Machine(
        part,
        args.out,
        scratch,
        args.model,
        args.adapter,
        args.limit,
        args.dry,
        facts,
        plain,
        args.ladder,
    )
    begun = time.monotonic()
    machine.say(f"{part} on {facts['device']}, vLLM {facts['vllm']}, {facts['git_sha']}")
    for item in module(part).items(args.dry):
        if machine.remaining() < item.seconds / 3:
            machine.fail(item.name, f"not run: {machine.remaining():.0f} s left")
            continue
        print(f"{machine.limit - machine.remaining():4.0f} s: {item.name}", flush=True)
        try:
            item.run(machine)
        except Exception as error:  # the other items go on
            traceback.print_exc()
            machine.fail(item.name, f"{type(error).__name__}: {error}")
    machine.say(f"{part}: {time.monotonic() - begun:.0f} s; everything in {args.out}")
    return machine.failed


if __name__ == "__main__":
    main()

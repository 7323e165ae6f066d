"""Part (d), optional: a training step of an 8B, random weights: rows a second and memory, by attention."""

from __future__ import annotations

import subprocess
import sys

from provenance import ROOT

from gpu.machine import Item, Machine
from gpu.models import LARGE, make_shape, make_tiny

LIMIT = 420
ARGV = {
    False: "--device cuda --dtype bfloat16 --lora-rank 16 --steps 4 --cases 2x1024x64 4x2048x64 --random-weights",
    True: "--device cpu --dtype float32 --lora-rank 2 --steps 1 --cases 1x32x4 --random-weights",
}
WAYS = {False: ("mask rows only", "mask rows, xformers"), True: ("mask rows, xformers",)}


def items(dry: bool) -> list[Item]:
    """One item."""
    return [Item("training step of an 8B: FlexAttention and xformers", 0, 180, training)]


def training(machine: Machine) -> None:
    """benchmarks/training_throughput.py writes its rows itself."""
    folder = machine.scratch / ("tiny" if machine.dry else LARGE)
    model = make_tiny(folder, 1) if machine.dry else make_shape(folder, LARGE)
    script = ROOT / "benchmarks" / "training_throughput.py"
    command = [sys.executable, str(script), *ARGV[machine.dry].split(), "--model", str(model)]
    command += ["--ways", *WAYS[machine.dry], "--out", str(machine.out / "training.csv")]
    with machine.log.open("a") as log:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True,
                timeout=min(LIMIT, machine.remaining()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            machine.fail("training", f"cut off; {machine.log}")
            return
    machine.say(f"\ntraining\n{done.stdout}")
    if done.returncode:
        machine.fail("training", f"exit code {done.returncode}; {machine.log}")

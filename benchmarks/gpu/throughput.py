"""Part (b): output tokens per second compared with plain vLLM at its best, at 1 to 256 requests and with arrivals.

Both engines are up at once and take turns, three times. The large model has random weights; the lengths that
its walks accept are a trained adapter's (imposed.py), the work of every step is a real one's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from gpu.engines import PLAIN, Arm, Engines, Failed, Task
from gpu.imposed import install
from gpu.machine import Item, Machine, Row, RowFile, table
from gpu.models import (
    LARGE,
    LORA_RANK,
    acceptance_of,
    make_adapter,
    make_shape,
    make_tiny,
    some_prompts,
)
from gpu.report import EAGLE_3, SHOWN, ratios
from gpu.requests import serve

COLUMNS = (
    "case", "arm", "load", "requests", "repeat", "tokens_per_second", "accepted_length", "step_ms",
    "ttft_ms", "tpot_ms", "identical", "failure",
)  # fmt: skip
BITA = "bita"
CLOSED, ARRIVALS = "closed", "arrivals"
REPEATS = 3
PROMPT_LEN = 128  # of the large model's requests
# (requests a second, seconds): they come in while others decode
LOADS = ((8, 5.0), (32, 5.0))


def items(dry: bool) -> list[Item]:
    """Most valuable first."""
    if dry:
        return [Item("tiny model, acceptance imposed", 2, 30, tiny)]
    return [
        Item(f"{LARGE} shape, dummy weights, acceptance imposed", 2, 330, large),
        Item("embedded model", 2, 190, embedded),
    ]


def large(machine: Machine) -> None:
    """Llama-3-8B's shape; deltas of the shipped adapter's rank, trees from its statistics."""
    model = make_shape(machine.scratch / LARGE, LARGE)
    adapter = make_adapter(
        machine.scratch / f"{LARGE}-adapter", model, acceptance_of(machine.adapter), LORA_RANK
    )
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        # Two engines share the GPU: the memory is given, not measured.
        "kv_cache_memory_bytes": 12 * 2**30,
        "gpu_memory_utilization": 0.4,
    }
    bita: dict[str, Any] = {"model": str(adapter)}
    if machine.ladder is not None:
        bita["ladder"] = str(machine.ladder)
    arms = [
        Arm(PLAIN, model, {**options, **machine.plain_options}),
        Arm(BITA, model, options, bita, prepare=install),
    ]
    prompts = some_prompts(256, PROMPT_LEN, 128256)
    requests = (1, 8, 16, 32, 64, 128, 256)
    measure(machine, LARGE, arms, closed_tasks(prompts, requests, 128, ignore_eos=True, step_ms=8),
            arriving_tasks(prompts, 128, ignore_eos=True))  # fmt: skip


def embedded(machine: Machine) -> None:
    """SmolLM2-135M-Instruct with its shipped adapter on MT-Bench: real tokens, a small model."""
    from cpu_throughput import load_prompts

    options = {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 6 * 2**30,
        "gpu_memory_utilization": 0.3,
    }
    arms = [
        Arm(PLAIN, machine.model, {**options, **machine.plain_options}),
        Arm(BITA, machine.model, options, {"model": str(machine.adapter)}),
    ]
    loaded = load_prompts(str(machine.model))
    prompts = [loaded[i % len(loaded)] for i in range(256)]
    requests = (1, 8, 32, 128, 256)
    measure(machine, "embedded", arms, closed_tasks(prompts, requests, 64, ignore_eos=False, step_ms=2),
            arriving_tasks(prompts, 64, ignore_eos=False))  # fmt: skip


def tiny(machine: Machine) -> None:
    """The whole way on a CPU: closed load, arrivals, imposed acceptance."""
    model = make_tiny(machine.scratch / "tiny", 1)
    acceptance = acceptance_of(machine.adapter)
    adapter = make_adapter(machine.scratch / "tiny-adapter-deltas", model, acceptance, 2)
    bita = {"model": str(adapter), "num_speculative_tokens": 7}
    arms = [Arm(PLAIN, model), Arm(BITA, model, {}, bita, prepare=install)]
    prompts = some_prompts(2, 8, 512)
    measure(machine, "tiny", arms, closed_tasks(prompts, (1, 2), 12, True, 0, repeats=1),
            arriving_tasks(prompts, 6, True, ((8, 0.25),), repeats=1))  # fmt: skip


def closed_tasks(
    prompts: Sequence[list[int]],
    requests: Sequence[int],
    max_tokens: int,
    ignore_eos: bool,
    step_ms: float,
    repeats: int = REPEATS,
) -> list[Task]:
    """N requests in flight until all are answered: at least two a point; once to warm up, then repeats."""
    tasks = []
    for repeat in range(0 if step_ms else 1, repeats + 1):
        for n in requests:
            chosen = [prompts[(repeat * 17 + i) % len(prompts)] for i in range(max(n, 2))]
            arguments = {"prompts": chosen, "max_tokens": max_tokens, "concurrency": n}
            seconds = max_tokens * step_ms / 1e3 * (1 + n / 128) * max(1, 2 / n)
            tasks.append(
                Task(
                    f"{CLOSED} {n} {repeat}",
                    serve,
                    {**arguments, "ignore_eos": ignore_eos},
                    seconds,
                )
            )
    return tasks


def arriving_tasks(
    prompts: Sequence[list[int]],
    max_tokens: int,
    ignore_eos: bool,
    loads: Sequence[tuple[int, float]] = LOADS,
    repeats: int = REPEATS,
) -> list[Task]:
    """Requests that come in at random times, the same ones for all arms: prefill next to blocks all the time."""
    tasks = []
    for repeat in range(1, repeats + 1):
        for rate, seconds in loads:
            clock, arrivals = random.Random(repeat), [0.0]
            while arrivals[-1] + (gap := clock.expovariate(rate)) < seconds:
                arrivals.append(arrivals[-1] + gap)
            chosen = [prompts[i % len(prompts)] for i in range(len(arrivals))]
            arguments = {"prompts": chosen, "max_tokens": max_tokens, "arrivals": arrivals}
            tasks.append(
                Task(
                    f"{ARRIVALS} {rate} {repeat}",
                    serve,
                    {**arguments, "ignore_eos": ignore_eos},
                    seconds + 3,
                )
            )
    return tasks


def measure(
    machine: Machine,
    case: str,
    arms: Sequence[Arm],
    closed: Sequence[Task],
    arriving: Sequence[Task],
) -> None:
    """One row an arm, load and repeat; repeat 0 warms up and is not kept. The table says medians and intervals."""
    file = RowFile(machine.out / f"throughput-{case}.csv", COLUMNS, machine.facts)
    outputs: dict[str, Any] = {}
    for arm, task, result in Engines(machine, arms).answers([*closed, *arriving]):
        load, requests, repeat = task.name.split()
        if repeat == "0":
            continue
        row: Row = {"case": case, "arm": arm, "load": load, "requests": requests, "repeat": repeat}
        if isinstance(result, Failed):
            file.add({**row, "failure": str(result)})
            continue
        mine = result.pop("outputs")
        theirs = outputs.setdefault(task.name, mine)
        if theirs is not mine and case != LARGE:  # there the walks' targets are not the model's
            row["identical"] = (
                f"{sum(a == b for a, b in zip(mine, theirs, strict=True))}/{len(mine)}"
            )
        file.add({**row, **result})
    file.close()
    machine.say(
        f"\n{case}\n{table(ratios(file.rows, PLAIN, EAGLE_3 if case == LARGE else {}), SHOWN)}"
    )

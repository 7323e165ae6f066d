"""Part (a): are the tokens plain vLLM's? Every kind of request, on a real engine next to a plain one.

The bita engine runs under vLLM's own checks: a host sync or a late compilation in a step is an error.
A difference where plain vLLM's two best tokens are within rounding is no defect: it is printed with that gap.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.engines import PLAIN, Arm, Engines, Failed, Task
from gpu.machine import Item, Machine, Row, RowFile, table
from gpu.models import make_adapter, make_tiny, some_prompts
from gpu.requests import KINDS, SAME_AS_LOGPROBS, answer

COLUMNS = (
    "case", "arm", "kind", "prompts", "identical", "largest_gap", "logprob_error", "cached_tokens",
    "seconds", "checks", "failure", "request_position_plain_bita_gap",
)  # fmt: skip
SHOWN = COLUMNS[:-1]
BITA = "bita"
ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 1024,  # a long prompt comes in chunks, next to blocks
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": 2**31,
    "gpu_memory_utilization": 0.2,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
FP8_KINDS = ("logprobs", "greedy", "prefix cache", "mixed", "seeded")
SANITIZER_LIMIT = 150


def items(dry: bool) -> list[Item]:
    """Most valuable first."""
    if dry:
        return [Item("tiny model, fp32", 2, 30, lambda machine: tiny(machine))]
    return [
        Item("embedded model, bf16", 2, 135, embedded),
        Item("tiny model, fp32", 2, 105, tiny),
        Item("embedded model, fp8 KV cache", 2, 105, fp8),
        Item("compute-sanitizer memcheck of the kernels", 0, 120, memcheck),
    ]


def embedded(machine: Machine) -> None:
    """SmolLM2-135M-Instruct in its shipped adapter's own trees, bf16."""
    options = {**ENGINE, "dtype": "bfloat16"}
    compare(machine, "embedded", *embedded_arms(machine, options), KINDS, chat_prompts(machine), 64)


def fp8(machine: Machine) -> None:
    """The same with fp8 keys and values; plain vLLM in its Triton backend, whose rounding is ours."""
    options = {**ENGINE, "dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    plain, bita = embedded_arms(machine, options)
    plain.options["attention_backend"] = "TRITON_ATTN"
    compare(machine, "embedded fp8", plain, bita, FP8_KINDS, chat_prompts(machine), 64)


def tiny(machine: Machine) -> None:
    """A random model in fp32, where nothing but a near tie may differ."""
    model = make_tiny(machine.scratch / "tiny", 1 if machine.dry else 3)
    adapter = make_adapter(machine.scratch / "tiny-adapter", model)
    options = {**ENGINE, "dtype": "float32"}
    plain = Arm(PLAIN, model, {**options, **machine.plain_options})
    bita = Arm(
        BITA, model, options, {"model": str(adapter), "tree": "2,1"}, checked=not machine.dry
    )
    number, max_tokens = (3, 6) if machine.dry else (32, 64)
    compare(machine, "tiny", plain, bita, KINDS, some_prompts(number, 40, 512), max_tokens)


def embedded_arms(machine: Machine, options: dict[str, Any]) -> tuple[Arm, Arm]:
    plain = Arm(PLAIN, machine.model, {**options, **machine.plain_options})
    return plain, Arm(BITA, machine.model, options, {"model": str(machine.adapter)}, checked=True)


def chat_prompts(machine: Machine) -> list[list[int]]:
    """MT-Bench's first turns in the model's chat template."""
    from cpu_throughput import load_prompts

    return load_prompts(str(machine.model))[:32]


def compare(
    machine: Machine,
    case: str,
    plain: Arm,
    bita: Arm,
    kinds: Sequence[str],
    prompts: Sequence[list[int]],
    max_tokens: int,
) -> None:
    """One row a kind, written when both engines have answered."""
    file = RowFile(machine.out / f"tokens-{case.replace(' ', '-')}.csv", COLUMNS, machine.facts)
    tasks = [
        Task(kind, answer, {"kind": kind, "prompts": prompts, "max_tokens": max_tokens})
        for kind in kinds
    ]
    found: dict[tuple[str, str], Any] = {}
    engines = Engines(machine, [plain, bita])
    for arm, task, result in engines.answers(tasks):
        found[arm, task.name] = result
        pair = [found.get((name, task.name)) for name in (plain.name, bita.name)]
        if None in pair:
            continue
        gaps = found.get((plain.name, "logprobs")) if task.name in SAME_AS_LOGPROBS else pair[0]
        file.add({
            "case": case,
            "arm": bita.name,
            "kind": task.name,
            "checks": "sync, JIT" if engines.checked(bita.name) else "",
            **beside_plain(pair[1], pair[0], gaps),
        })  # fmt: skip
    file.close()
    machine.say(f"\n{case}\n{table(file.rows, SHOWN)}")
    for row in file.rows:
        if row["request_position_plain_bita_gap"]:
            machine.say(f"{row['kind']}: {row['request_position_plain_bita_gap']}")


def beside_plain(bita: Any, plain: Any, gaps: Any) -> Row:
    """How many outputs are plain vLLM's; where one leaves them, the gap of plain's two best logprobs there."""
    for name, result in (("plain", plain), ("bita", bita)):
        if isinstance(result, Failed):
            return {"failure": f"{name}: {result}"}
    known = gaps["logprobs"] if gaps and not isinstance(gaps, Failed) else []
    places = list(differences(bita["tokens"], plain["tokens"]))
    entries, largest = [], 0.0
    for request, position, a, b in places:
        row = known[request] if request < len(known) else []
        gap = row[position][1] if position < len(row) else None
        largest = max(largest, gap or 0.0)
        entries.append(f"{request}:{position}:{a}:{b}:{'' if gap is None else round(gap, 5)}")
    errors = [
        abs(x[0] - y[0])
        for mine, theirs, a, b in zip(
            bita["logprobs"], plain["logprobs"], bita["tokens"], plain["tokens"], strict=True
        )
        for x, y, p, q in zip(mine, theirs, a, b, strict=False)
        if p == q
    ]
    return {
        "prompts": len(plain["tokens"]),
        "identical": len(plain["tokens"]) - len(places),
        "largest_gap": round(largest, 5),
        "logprob_error": f"{max(errors):.1e}" if errors else "",
        "cached_tokens": bita["cached_tokens"],
        "seconds": bita["seconds"],
        "request_position_plain_bita_gap": " ".join(entries),
    }


def differences(
    bita: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, int, int]]:
    """(request, first place that differs, plain's token, bita's token); -1 after an end."""
    for i, (mine, theirs) in enumerate(zip(bita, plain, strict=True)):
        if list(mine) == list(theirs):
            continue
        length = max(len(mine), len(theirs))
        padded = [list(x) + [-1] * (length - len(x)) for x in (theirs, mine)]
        yield i, *next((n, a, b) for n, (a, b) in enumerate(zip(*padded, strict=True)) if a != b)


def memcheck(machine: Machine) -> None:
    """The kernels' small cases under compute-sanitizer, where the tool is on the machine."""
    import shutil
    import sys

    script = Path(__file__).parents[1] / "memcheck.py"
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        machine.say("memcheck: compute-sanitizer is not on this machine")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    limit = min(SANITIZER_LIMIT, machine.remaining())
    with machine.log.open("a") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=limit)
        except subprocess.TimeoutExpired:
            machine.fail("memcheck", f"did not end within {limit:.0f} s")
            return
    if done.returncode:
        machine.fail("memcheck", f"exit code {done.returncode}; {machine.log}")
    else:
        machine.say("memcheck: no error in any kernel")

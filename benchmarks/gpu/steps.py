"""Part (c): a ladder for this GPU from measured steps, kernels compared with their peers, steps by context."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from provenance import ROOT

from gpu.engines import PLAIN, Arm, Engines, Failed, Task
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

STEP_COLUMNS = ("case", "requests", "rows", "step_ms", "to_plain")
KERNEL_SHOWN = ("context", "requests", "rows", "provider", "time_us", "share_of_floor", "failure")
CONTEXT_COLUMNS = ("case", "arm", "context", "requests", "step_ms", "failure")
TUNE_LIMIT, KERNEL_LIMIT = 200, 210
# Contexts in the outer loop: what a limit cuts off is the longest.
KERNELS = {
    False: "--shape Llama-3-8B/Qwen3-4B --context 1024 8192 32768 130048 --requests 1 8 64 --rows 1 16 52 "
    "--provider bita fa3-causal vllm-qq-bias vllm-causal flashinfer xformers flex",
    True: "--shape SmolLM2-135M --context 64 --requests 1 --rows 4 --device cpu",
}
TUNE = {
    False: "--requests 1 4 16 32 64 128 --rows 4 8 16 32 64 --steps 32 --max-num-seqs 256 --dtype bfloat16",
    True: "--requests 1 2 --rows 4 8 --steps 2 --max-num-seqs 2 --dtype float32",
}
CONTEXTS, CONTEXT_REQUESTS, CONTEXT_STEPS = (1024, 8192, 16384), (1, 8), 32
CONTEXT_ROWS, WARM_UP_STEPS = 16, 4


def items(dry: bool) -> list[Item]:
    """Most valuable first."""
    return [
        Item(f"bita tune, {LARGE} shape: a ladder of this GPU", 1, 130, tune),
        Item("tree attention beside its peers", 0, KERNEL_LIMIT, kernels),
        Item(f"steps by context, {LARGE} shape", 2, 110, contexts),
    ]


def large_model(machine: Machine) -> tuple[Path, Path]:
    """Llama-3-8B's shape and an adapter for it, with the shipped one's statistics and rank."""
    model = make_shape(machine.scratch / LARGE, LARGE)
    acceptance = acceptance_of(machine.adapter)
    return model, make_adapter(machine.scratch / f"{LARGE}-adapter", model, acceptance, LORA_RANK)


def tune(machine: Machine) -> None:
    """`bita tune`, which times plain steps and blocks of every size in one engine; its ladder and a row a point."""
    if machine.dry:
        model = make_tiny(machine.scratch / "tiny", 1)
        adapter = make_adapter(machine.scratch / "tiny-adapter", model)
        case, engine_args = "tiny", {"enforce_eager": True, "block_size": 32}
    else:
        model, adapter = large_model(machine)
        case, engine_args = LARGE, {"load_format": "dummy", "skip_tokenizer_init": True}
    device = re.sub(r"[^A-Za-z0-9]+", "-", machine.facts["device"]).strip("-")
    path = machine.out / f"ladder-{case}-{device}.json"
    argv = ["tune", str(adapter), *TUNE[machine.dry].split(), "--out", str(path), "--again"]
    argv += ["--engine-args", json.dumps(engine_args)]
    if machine.dry:
        run_cli_interpreted(argv)
    else:
        try:
            run_cli(argv, machine, TUNE_LIMIT)
        except RuntimeError as error:  # its table needs a package that the machine may lack
            if not path.exists():
                raise
            machine.fail("bita tune", f"{error}; its ladder is there")
    points = json.loads(path.read_text())["provenance"]["step_seconds"]
    file = RowFile(machine.out / "steps.csv", STEP_COLUMNS, machine.facts)
    plain = {requests: seconds for requests, rows, seconds, _ in points if rows == 1}
    for requests, rows, seconds, _ in points:
        ratio = round(seconds / plain[requests], 3) if requests in plain else ""
        row = {"case": case, "requests": requests, "rows": f"{rows:.4g}", "to_plain": ratio}
        file.add({**row, "step_ms": round(1e3 * seconds, 3)})
    file.close()
    machine.say(f"\nsteps of {case}\n{table(file.rows, STEP_COLUMNS)}\nladder: {path.name}")


def run_cli(argv: Sequence[str], machine: Machine, limit: float) -> None:
    """The `bita` command in a process of its own. Raises RuntimeError if it fails or takes too long."""
    process = get_context("spawn").Process(target=_cli, args=(list(argv), machine.log))
    process.start()
    process.join(min(limit, machine.remaining()))
    if process.is_alive():
        os.killpg(process.pid, 9)
        process.join()
        raise RuntimeError(f"bita {argv[0]} did not end within {limit} s; {machine.log}")
    if process.exitcode:
        raise RuntimeError(f"bita {argv[0]} ended with {process.exitcode}; {machine.log}")


def _cli(argv: list[str], log: Path) -> None:
    os.setpgrp()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from bita_vllm import cli, plugin

    plugin.register()
    sys.exit(cli.main(argv))


def run_cli_interpreted(argv: Sequence[str]) -> None:
    """The same in this process, as the tests run it."""
    from testbed.engines import in_this_process, torch_threads

    from bita_vllm import cli
    from bita_vllm.tuning import answers, profile

    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # stronger than any argument
    # What it prints is no figure: little of everything does.
    profile.PRECISION, profile.MOST_WARM_UPS = 10.0, 1
    answers.NUM_ANSWERS, answers.MOST_ATTEMPTS = 2, 1
    answers.PROMPT_TOKENS, answers.ANSWER_TOKENS = 8, 8
    with torch_threads(1), in_this_process():
        if cli.main(list(argv)):
            raise RuntimeError("bita tune failed")


def kernels(machine: Machine) -> None:
    """benchmarks/kernel_benchmark.py writes its rows itself, each when it is measured."""
    out = machine.out / ("kernels_dry.csv" if machine.dry else "kernels.csv")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kernel_benchmark.py"),
        *KERNELS[machine.dry].split(),
    ]
    limit = min(KERNEL_LIMIT, machine.remaining())
    with machine.log.open("a") as log:
        try:
            done = subprocess.run(
                [*command, "--out", str(out)],
                stdout=subprocess.PIPE, stderr=log, text=True, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            machine.fail("kernels", f"cut off after {limit:.0f} s; so far: {out.name}")
            machine.say(table(list(csv.DictReader(out.open())), KERNEL_SHOWN))
            return
    machine.say(f"\nkernels\n{done.stdout}")
    if done.returncode:
        machine.fail("kernels", f"exit code {done.returncode}; {machine.log}")


def contexts(machine: Machine) -> None:
    """Median time of a step while every request decodes, by context: plain vLLM and blocks of 16 rows."""
    if machine.dry:
        model = make_tiny(machine.scratch / "tiny", 1)
        adapter = make_adapter(machine.scratch / "tiny-adapter", model)
        case, lengths, requests, steps = "tiny", (8,), (1, 2), 2
    else:
        model, adapter = large_model(machine)
        case, lengths, requests, steps = LARGE, CONTEXTS, CONTEXT_REQUESTS, CONTEXT_STEPS
    arms = [Arm(PLAIN, model), Arm(f"bita {CONTEXT_ROWS} rows", model, {}, {"model": str(adapter)})]
    for arm, rows in zip(arms, (1, CONTEXT_ROWS), strict=True):
        if arm.bita is not None:
            arm.bita["num_speculative_tokens"] = rows - 1
        if not machine.dry:
            arm.options.update(context_options(rows))
    arms[0].options.update(machine.plain_options)
    tasks = [
        Task(
            f"{context} {n}",
            decode_steps,
            {"context": context, "requests": n, "steps": steps},
            3 + n * context / 20000,
        )
        for context in lengths
        for n in requests
    ]
    file = RowFile(machine.out / "contexts.csv", CONTEXT_COLUMNS, machine.facts)
    for arm, task, result in Engines(machine, arms).answers(tasks):
        context, n = task.name.split()
        row: Row = {"case": case, "arm": arm, "context": context, "requests": n}
        key = "failure" if isinstance(result, Failed) else "step_ms"
        file.add({**row, key: str(result) if isinstance(result, Failed) else result})
    file.close()
    machine.say(f"\nsteps by context\n{table(file.rows, CONTEXT_COLUMNS)}")


def context_options(rows: int) -> dict[str, Any]:
    """Of an engine that serves long contexts: not compiled, FULL graphs of these sizes alone, so it starts soon."""
    return {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 131072,  # as served: our splits follow from it
        "max_num_seqs": max(CONTEXT_REQUESTS),
        "enable_prefix_caching": False,
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 18 * 2**30,  # two engines share the GPU
        "gpu_memory_utilization": 0.4,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [n * rows for n in CONTEXT_REQUESTS],
        },
    }


def decode_steps(llm: Any, context: int, requests: int, steps: int) -> float:
    """Milliseconds of a step in which all requests decode: the median; the requests are dropped then."""
    from statistics import median

    from vllm import SamplingParams

    engine = llm.llm_engine
    names = [f"{context}-{requests}-{i}" for i in range(requests)]
    prompts = some_prompts(requests, context, engine.model_config.get_vocab_size())
    params = SamplingParams(
        temperature=0.0, max_tokens=8 * (steps + WARM_UP_STEPS), ignore_eos=True, detokenize=False
    )
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    times: list[float] = []
    while len(times) < steps + WARM_UP_STEPS and engine.has_unfinished_requests():
        decoding, begun = len(started) == requests, time.perf_counter()
        started |= {output.request_id for output in engine.step()}
        if decoding:
            times.append(time.perf_counter() - begun)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return round(1e3 * median(times[WARM_UP_STEPS:] or times), 3)

"""What an engine step costs on a CPU, part by part: plain vLLM, bita without drafts, and step blocks of several sizes.

`make bench-steps` runs it with the libraries that vLLM advises on a CPU. Every arm is an engine in a process of its
own, compiled and warmed up. Arms take turns, one request at a time, on the same MT-Bench prompts, so that drift of the
machine hits all of them. Times of steps are medians (and tenth percentiles, which a busy neighbour moves less) over all
decode steps; a part's time is wall time inside one of the runner's or the engine's methods.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cpu_engines import MASKS_ALONE, PLAIN, Arm, Engine, compute_on_every_core, engine_facts
from cpu_throughput import (
    ADAPTER,
    KV_CACHE_BYTES,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    RESULTS,
    in_turn,
    load_prompts,
    missing_libraries,
    rotate,
    rounded,
    table,
    write_csv,
)
from provenance import provenance

# part: the methods whose time it is, none inside another part's. Of the engine core's scheduler, of the runner, of
# the forms of the model.
PARTS = {
    "schedule": ("schedule", "update_from_output"),
    "inputs": ("_update_states", "_prepare_inputs", "_get_slot_mappings"),
    "metadata": ("_build_attention_metadata",),
    "model": ("_model_forward",),
    "head": ("compute_logits",),
    "sample": ("_sample",),
    "bookkeeping": ("_bookkeeping_sync",),
    "next blocks": ("propose_draft_token_ids",),
}


@dataclass
class Steps:
    """All decode steps of some prompts, one request at a time.

    Attributes:
        seconds: of each step.
        parts: of each step, by part.
        tokens: emitted in all of them.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0


class Clock:
    """Adds up the time inside methods, by part, without counting twice what one part calls of another."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._inside: list[str] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time `owner.name`; owners that lack it are left alone."""
        method: Callable[..., Any] | None = getattr(owner, name, None)
        if method is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self._inside.pop()
                self.spent[part] += took
                if self._inside:
                    self.spent[self._inside[-1]] -= took

        setattr(owner, name, timed)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        spent, self.spent = self.spent, dict.fromkeys(PARTS, 0.0)
        return spent


def serve_steps(conn: Connection, log: str, engine_args: dict[str, Any]) -> None:
    """Start an engine, then answer (prompts, max_tokens) with `Steps` until the pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from vllm import LLM

        engine = LLM(**engine_args).llm_engine
        conn.send(engine_facts(engine.vllm_config))
        core = engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        forms = {id(form): form for form in (runner.model, getattr(runner, "_block_model", None))}
        clock = Clock()
        for part, names in PARTS.items():
            for name in names:
                for owner in (core.scheduler, runner, *forms.values()):
                    clock.wrap(owner, name, part)
        while True:
            conn.send(time_steps(engine, clock, *conn.recv()))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        conn.send(error)


def time_steps(engine: Any, clock: Clock, prompts: list[list[int]], max_tokens: int) -> Steps:
    """Answer the prompts greedily, one after the other; prefill steps are not counted."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    steps = Steps()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        decoding = False
        while engine.has_unfinished_requests():
            clock.read()
            start = time.perf_counter()
            emitted = engine.step()
            took = time.perf_counter() - start
            if decoding:
                steps.seconds.append(took)
                steps.tokens += sum(len(output.outputs[0].token_ids) for output in emitted)
                for part, seconds in clock.read().items():
                    steps.parts[part].append(seconds)
            decoding = decoding or bool(emitted)
    return steps


def summary(arm: Arm, rows: int, measured: list[Steps], plain_rate: float) -> dict[str, Any]:
    """One arm's line: medians over all steps of all repeats; `plain_rate` is 0 for plain itself."""
    seconds = [second for steps in measured for second in steps.seconds]
    tokens_per_step = sum(steps.tokens for steps in measured) / len(seconds)
    median = statistics.median(seconds)
    rate = tokens_per_step / median
    parts = {
        part: statistics.median(second for steps in measured for second in steps.parts[part])
        for part in PARTS
    }
    parts["other"] = median - sum(parts.values())
    return {
        "arm": arm.name,
        "rows": rows,
        "ms_per_step": 1e3 * median,
        "ms_per_step_p10": 1e3 * statistics.quantiles(seconds, n=10)[0],
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": rate,
        "to_plain": rate / (plain_rate or rate),
        **{f"ms_{part.replace(' ', '_')}": 1e3 * second for part, second in parts.items()},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--adapter", default=str(ADAPTER))
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 24])
    parser.add_argument("--rows-with-copies", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=4, help="a repeat")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_steps.csv")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("steps_cpu: terminated"))
    compute_on_every_core()
    from tqdm import tqdm

    from bita_vllm.embedded import embedded_model_dir
    from bita_vllm.training.base_model import choose_dtype

    if missing := missing_libraries():
        print(f"not preloaded: {', '.join(missing)}; every arm is slower without.")
    model = args.model or str(embedded_model_dir())
    dtype = choose_dtype(args.dtype, "cpu")
    engine_args = {
        "model": model,
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    masks = [f"{MASKS_ALONE}:{rows}" for rows in args.rows]
    specs = ["none", *masks, *(f"auto:{rows}" for rows in args.rows_with_copies)]
    arms = [PLAIN, *(Arm.bita(spec, args.adapter, named=False) for spec in specs)]
    prompts = load_prompts(model)
    engines: list[Engine] = []
    measured: dict[str, list[Steps]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="steps_cpu-") as logs:
        try:
            for arm in tqdm(arms, desc="starting", unit="arm"):
                engines.append(Engine(arm, engine_args, Path(logs), serve_steps))
                engines[-1].ask(rotate(prompts, 0, 1), 32)
            for repeat in tqdm(range(args.repeats), desc="measuring", unit="repeat"):
                chosen = rotate(prompts, repeat * args.prompts, args.prompts)
                for engine in in_turn(engines, repeat):
                    measured[engine.arm.name].append(engine.ask(chosen, args.max_tokens))
        finally:
            for engine in engines:
                engine.close()
    lines: list[dict[str, Any]] = []
    for engine in engines:
        plain_rate = lines[0]["tokens_per_second"] if lines else 0.0
        name = engine.arm.name
        lines.append(summary(engine.arm, engine.facts["rows"], measured[name], plain_rate))
    header = list(lines[0])
    print(
        table(
            header,
            [
                [f"{v:.3f}" if isinstance(v, float) else str(v) for v in line.values()]
                for line in lines
            ],
        )
    )
    facts = {
        "model": Path(model).name,
        "dtype": dtype,
        "max_tokens": args.max_tokens,
        **provenance(),
    }
    write_csv(args.out, [rounded({**line, **facts}) for line in lines])


if __name__ == "__main__":
    main()

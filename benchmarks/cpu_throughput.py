"""Output tokens per second of BiTA beside plain vLLM on a CPU, at several concurrencies.

`make bench-cpu` runs it with the libraries that vLLM advises on a CPU. Every arm is an engine in a
process of its own, started with the same settings, compiled and warmed up. Arms are measured in
turn, one at a time and in alternating order, on the same MT-Bench prompts (first turns, chat
template, greedy), so that drift of the machine hits all of them. Prefix caching is off: every
repeat pays for its prefill.

`--row-cost` instead measures what an engine step costs as its step block grows.
"""

import argparse
import csv
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from provenance import ROOT, preloaded, provenance

ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"
QUESTIONS = ROOT / "benchmarks" / "data" / "mt_bench_questions.jsonl"
RESULTS = ROOT / "benchmarks" / "results"
MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16
KV_CACHE_BYTES = 1 << 30
QUICK = {"concurrency": [1, 4], "prompts": 4, "repeats": 1, "max_tokens": 48}
ROW_COST_ROWS = (4, 8, 12, 16, 24, 32)

# --- Arms: what is compared -----------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One engine: plain vLLM (no tree), or BiTA with an adapter, a tree and perhaps a row budget."""

    name: str
    adapter: str = ""
    tree: str = ""
    row_budget: int | None = None

    @classmethod
    def bita(cls, spec: str, adapter: str, named: bool) -> "Arm":
        """'auto', 'auto:16' (at most 16 rows), '5,4,3' or a template file; the adapter in the name or not."""
        tree, _, rows = spec.partition(":")
        path = str(Path(adapter).resolve()) if Path(adapter).exists() else adapter
        name = f"bita {spec} {Path(path).name}" if named else f"bita {spec}"
        return cls(name, path, tree, int(rows) if rows else None)

    def speculative_config(self) -> dict[str, Any] | None:
        if not self.tree:
            return None
        config: dict[str, Any] = {"method": "bita", "model": self.adapter, "tree": self.tree}
        if self.row_budget is not None:
            config["num_speculative_tokens"] = self.row_budget - 1
        return config


PLAIN = Arm("plain")
Spread = tuple[float, float, float]  # median, least, most


@dataclass
class Measurement:
    """One arm, one concurrency, one set of prompts.

    Attributes:
        seconds: from the first request to the last token.
        outputs: token ids of each prompt.
        accepted_length: tokens a request got per decode step; the token of its prefill not counted.
        step_ms: mean time of an engine step, over the steps in which no request came in.
    """

    seconds: float
    outputs: list[list[int]]
    accepted_length: float
    step_ms: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


# --- The worker: one engine in its own process ----------------------------------------------------


def serve_engine(conn: Connection, log: str, engine_args: dict[str, Any]) -> None:
    """Start an engine, then answer (concurrency, prompts, max_tokens) until the pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from vllm import LLM

        llm = LLM(**engine_args)
        conn.send(engine_facts(llm.llm_engine.vllm_config))
        try:
            while True:
                task = conn.recv()
                if task == "peak memory":
                    conn.send(peak_rss_mib())
                else:
                    conn.send(measure(llm.llm_engine, *task))
        finally:
            llm.llm_engine.engine_core.shutdown()
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        conn.send(error)


def engine_facts(vllm_config: Any) -> dict[str, Any]:
    """Rows and shape of the step block, as the engine sees them."""
    spec = vllm_config.speculative_config
    if spec is None:
        return {"rows": 1, "block": "one row"}
    from bita_vllm.config import get_settings

    template = get_settings(vllm_config).template  # type: ignore[union-attr]
    return {"rows": template.num_rows, "block": template.describe()}


def measure(
    engine: Any, concurrency: int, prompts: list[list[int]], max_tokens: int
) -> Measurement:
    """Serve all prompts greedily, `concurrency` of them in flight as long as they last."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    emissions = [0] * len(prompts)  # engine steps that gave a prompt tokens
    step_seconds: list[float] = []
    waiting, in_flight = list(range(len(prompts))), 0
    start = now = time.perf_counter()
    while waiting or in_flight:
        came_in = False
        while waiting and in_flight < concurrency:
            index = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": prompts[index]}, params)
            in_flight, came_in = in_flight + 1, True
        emitted = engine.step()
        last, now = now, time.perf_counter()
        if emitted and not came_in:
            step_seconds.append(now - last)
        for output in emitted:
            index, completion = int(output.request_id), output.outputs[0]
            if completion.token_ids:
                outputs[index] += completion.token_ids
                emissions[index] += 1
            in_flight -= output.finished
    decode_tokens = sum(map(len, outputs)) - len(outputs)
    return Measurement(
        seconds=now - start,
        outputs=outputs,
        accepted_length=decode_tokens / max(sum(emissions) - len(outputs), 1),
        step_ms=1e3 * statistics.mean(step_seconds) if step_seconds else float("nan"),
    )


def peak_rss_mib() -> float:
    """Peak resident memory of this process and the engine's processes, summed."""
    import psutil

    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next((li for li in status.splitlines() if li.startswith("VmHWM")), "VmHWM: 0 kB")
        total += int(peak.split()[1])
    return total / 1024


class Engine:
    """The parent's end of a worker."""

    def __init__(self, arm: Arm, engine_args: dict[str, Any], logs: Path) -> None:
        self.arm = arm
        self.log = logs / f"{arm.name.replace(' ', '-').replace('/', '_')}.log"
        args = {**engine_args, "speculative_config": arm.speculative_config()}
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        # Not a daemon: the engine has processes of its own.
        self._process = context.Process(target=serve_engine, args=(theirs, str(self.log), args))
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def ask(self, *task: Any) -> Any:
        self._conn.send(task[0] if len(task) == 1 else task)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._conn.recv()
        except EOFError:
            answer = RuntimeError("the engine's process died")
        if isinstance(answer, Exception):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            self.close()
            sys.exit(f"{tail}\ncpu_throughput: arm '{self.arm.name}': {answer}")
        return answer

    def close(self) -> None:
        """End the worker and the engine's own processes, which outlive a worker that is killed."""
        self._conn.close()
        alive = self._process.is_alive()
        children = psutil.Process(self._process.pid).children(recursive=True) if alive else []
        self._process.join(timeout=30)
        for process in [self._process, *(child for child in children if child.is_running())]:
            process.kill()


# --- Measuring ------------------------------------------------------------------------------------


@dataclass
class Point:
    """All repeats of one arm at one concurrency."""

    arm: Arm
    concurrency: int
    measured: list[Measurement] = field(default_factory=list)

    def rate(self) -> Spread:
        """Output tokens per second: median, least, most."""
        return spread([m.tokens_per_second for m in self.measured])

    def ratio(self, plain: "Point") -> Spread:
        """Rate over plain's of the same repeat: median, least, most."""
        pairs = zip(self.measured, plain.measured, strict=True)
        return spread([m.tokens_per_second / p.tokens_per_second for m, p in pairs])

    def identical(self, plain: "Point") -> float:
        """Share of prompts whose output is plain's, token for token."""
        pairs = zip(self.measured, plain.measured, strict=True)
        same = [a == b for m, p in pairs for a, b in zip(m.outputs, p.outputs, strict=True)]
        return statistics.mean(same)


def spread(values: list[float]) -> Spread:
    return statistics.median(values), min(values), max(values)


def load_prompts(model: str) -> list[list[int]]:
    """First turns in the chat template, as token ids; neighbours are of different categories."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    by_category: dict[str, list[str]] = {}
    for question in questions:
        by_category.setdefault(question["category"], []).append(question["turns"][0])
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        for turns in zip(*by_category.values(), strict=True)
        for turn in turns
    ]


def rotate(prompts: list[list[int]], start: int, count: int) -> list[list[int]]:
    return [prompts[(start + i) % len(prompts)] for i in range(count)]


def in_turn(engines: list[Engine], repeat: int) -> Iterator[Engine]:
    """Every engine once, first to last in even repeats, last to first in odd ones."""
    yield from engines if repeat % 2 == 0 else reversed(engines)


def compare(
    engines: list[Engine], prompts: list[list[int]], args: argparse.Namespace
) -> list[Point]:
    """Measure the arms in turn; other prompts in each repeat, the same ones for every arm."""
    from tqdm import tqdm

    for engine in tqdm(engines, desc="warming up", unit="arm"):
        for concurrency in {1, max(args.concurrency)}:
            engine.ask(concurrency, rotate(prompts, 0, concurrency), 16)
    points = [Point(e.arm, c) for c in args.concurrency for e in engines]
    by_key = {(p.arm, p.concurrency): p for p in points}
    with tqdm(total=len(points) * args.repeats, desc="measuring", unit="point") as progress:
        for repeat in range(args.repeats):
            for concurrency in args.concurrency:
                count = max(args.prompts, 4 * concurrency)
                chosen = rotate(prompts, repeat * count, count)
                for engine in in_turn(engines, repeat):
                    progress.set_postfix_str(f"{engine.arm.name} at {concurrency}")
                    task = (concurrency, chosen, args.max_tokens)
                    by_key[engine.arm, concurrency].measured.append(engine.ask(*task))
                    progress.update()
    return points


# --- Reporting ------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, title: str, ratios: dict[str, list[tuple[int, Spread]]]) -> None:
    """Ratio against concurrency, one line an arm; bars reach from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(1.0, color="grey", linestyle="--", label="plain vLLM")
    for name, series in ratios.items():
        x = [concurrency for concurrency, _ in series]
        middle = [m for _, (m, _, _) in series]
        bars = [[m - low for _, (m, low, _) in series], [high - m for _, (m, _, high) in series]]
        axes.errorbar(x, middle, yerr=bars, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({c for series in ratios.values() for c, _ in series})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="concurrent requests", ylabel="output tokens/s, BiTA / plain vLLM")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=150)


def spread_columns(name: str, values: Spread) -> dict[str, float]:
    return dict(zip((name, f"{name}_min", f"{name}_max"), values, strict=True))


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}


def report(
    engines: list[Engine], points: list[Point], facts: dict[str, Any], args: argparse.Namespace
) -> None:
    block = {engine.arm: engine.facts for engine in engines}
    peak = {engine.arm: engine.ask("peak memory") for engine in engines}
    plain = {p.concurrency: p for p in points if p.arm == PLAIN}
    lines, rows = [], []
    ratios: dict[str, list[tuple[int, Spread]]] = {}
    for point in points:
        rate, ratio = point.rate(), point.ratio(plain[point.concurrency])
        identical = point.identical(plain[point.concurrency])
        accepted = statistics.median(m.accepted_length for m in point.measured)
        step_ms = statistics.median(m.step_ms for m in point.measured)
        if point.arm != PLAIN:
            name = f"{point.arm.name} ({block[point.arm]['rows']} rows)"
            ratios.setdefault(name, []).append((point.concurrency, ratio))
        lines.append(
            [
                str(point.concurrency),
                point.arm.name,
                str(block[point.arm]["rows"]),
                f"{rate[0]:.1f} ({rate[1]:.1f}-{rate[2]:.1f})",
                f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})",
                f"{accepted:.2f}",
                f"{step_ms:.1f}",
                f"{identical:.1%}",
            ]
        )
        rows.append(
            {
                **facts,
                "arm": point.arm.name,
                "concurrency": point.concurrency,
                "tree": point.arm.tree,
                "rows": block[point.arm]["rows"],
                "block": block[point.arm]["block"],
                "repeats": len(point.measured),
                "prompts_per_repeat": len(point.measured[0].outputs),
                **spread_columns("tokens_per_s", rate),
                **spread_columns("ratio", ratio),
                "accepted_length": accepted,
                "step_ms": step_ms,
                "identical_share": identical,
                "peak_rss_mib": peak[point.arm],
            }
        )
    write_csv(args.out, [rounded(row) for row in rows])
    title = f"{Path(facts['model']).name}, MT-Bench, greedy, {facts['dtype']}, {facts['device']}"
    plot(args.out.with_suffix(".png"), title, ratios)
    print()
    for engine in engines:
        print(f"{engine.arm.name}: {engine.facts['block']}; peak RSS {peak[engine.arm]:.0f} MiB")
    header = ["concurrent", "arm", "rows", "tokens/s (least-most)", "BiTA/plain (least-most)"]
    print(f"\n{table([*header, 'accepted', 'ms/step', 'identical'], lines)}\n")
    print(f"written: {args.out}, {args.out.with_suffix('.png')}")


def report_row_cost(
    measured: list[tuple[dict[str, Any], list[Point]]],
    facts: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    lines, rows = [], []
    for block, points in measured:
        plain = {p.concurrency: p for p in points if p.arm == PLAIN}
        for point in (p for p in points if p.arm != PLAIN):
            pairs = zip(point.measured, plain[point.concurrency].measured, strict=True)
            cost = spread([m.step_ms / p.step_ms for m, p in pairs])
            step_ms = statistics.median(m.step_ms for m in point.measured)
            plain_ms = statistics.median(m.step_ms for m in plain[point.concurrency].measured)
            accepted = statistics.median(m.accepted_length for m in point.measured)
            rows.append(
                {
                    **facts,
                    "concurrency": point.concurrency,
                    "tree": point.arm.name.removeprefix("bita "),
                    "rows": block["rows"],
                    "block": block["block"],
                    "step_ms": step_ms,
                    "plain_step_ms": plain_ms,
                    **spread_columns("cost", cost),
                    "accepted_length": accepted,
                }
            )
            lines.append(
                [
                    str(point.concurrency),
                    str(block["rows"]),
                    f"{step_ms:.1f}",
                    f"{plain_ms:.1f}",
                    f"{cost[0]:.2f} ({cost[1]:.2f}-{cost[2]:.2f})",
                    f"{accepted:.2f}",
                    f"{accepted / cost[0]:.2f}",
                ]
            )
    write_csv(args.out, [rounded(row) for row in rows])
    header = ["concurrent", "rows", "ms/step", "plain ms/step", "cost of a step (least-most)"]
    print(f"\n{table([*header, 'accepted', 'accepted/cost'], lines)}\n\nwritten: {args.out}")


# --- Command line ---------------------------------------------------------------------------------


def missing_libraries() -> list[str]:
    """Libraries that vLLM advises to preload on a CPU, and that are not in LD_PRELOAD."""
    loaded = " ".join(preloaded())
    return [name for name in ("libiomp5", "libtcmalloc") if name not in loaded]


def compute_on_every_core() -> None:
    """Each arm's engine runs in the arm's own process: vLLM's best on few cores.

    Otherwise its engine process waits for its worker in a busy loop, on a core that computes nothing (one request, two
    cores: plain vLLM 12.7 to 17 tokens/s, in one process 20.4).
    """
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tree", action="append", metavar="TREE", help="a BiTA arm, repeatable: 'auto' (default), "
        "'auto:16' (at most 16 rows), widths such as '5,4,3', or a template file")  # fmt: skip
    add("--rows", action="append", type=int, metavar="R", help="the same as --tree auto:R")
    add("--concurrency", type=int, nargs="+", metavar="N",
        help="requests in flight (default: 1 2 4 8; with --row-cost 1)")  # fmt: skip
    add("--prompts", type=int, default=12, help="prompts a point, at least four times the "
        "concurrency (default: %(default)s)")  # fmt: skip
    add("--repeats", type=int, default=3, help="default: %(default)s")
    add("--max-tokens", type=int, default=64, help="default: %(default)s")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="auto (default): bfloat16 where the CPU has native bf16 (AVX512_BF16 or AMX), else "
        "float32: there oneDNN has no bf16 matmul, vLLM falls back to a loop whose cost grows with "
        "every row (seen: 16 rows at 14 times the cost of one), and float32 is "
        "plain vLLM's own best setting")  # fmt: skip
    add("--model", help="default: the embedded model, SmolLM2-135M-Instruct")
    add("--adapter", nargs="+", default=[str(ADAPTER)], help="one or several, each with every tree "
        "(default: adapters/smollm2-135m-instruct)")  # fmt: skip
    add("--row-cost", action="store_true", help="measure ms per engine step as the step block "
        f"grows (--tree, default: auto of {', '.join(map(str, ROW_COST_ROWS))} rows)")  # fmt: skip
    add("--quick", action="store_true", help="about three minutes: "
        + ", ".join(f"{key} {value}" for key, value in QUICK.items()))  # fmt: skip
    add("--out", type=Path, help="CSV (default: benchmarks/results/cpu_{throughput,row_cost}.csv); "
        "the plot lies beside it")  # fmt: skip
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK)
    given.concurrency = given.concurrency or ([1] if given.row_cost else [1, 2, 4, 8])
    if max(given.concurrency) > MAX_NUM_SEQS or min(given.concurrency) < 1:
        parser.error(f"--concurrency goes from 1 to {MAX_NUM_SEQS}, got {given.concurrency}")
    trees = (given.tree or []) + [f"auto:{rows}" for rows in given.rows or []]
    default = [f"auto:{rows}" for rows in ROW_COST_ROWS] if given.row_cost else ["auto"]
    several = len(given.adapter) > 1
    given.arms = [
        Arm.bita(t, adapter, several) for adapter in given.adapter for t in trees or default
    ]
    name = "cpu_row_cost.csv" if given.row_cost else "cpu_throughput.csv"
    given.out = (given.out or RESULTS / name).resolve()
    return given


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cpu_throughput: terminated"))
    compute_on_every_core()
    from tqdm import tqdm

    from bita_vllm.embedded import embedded_model_dir
    from bita_vllm.training.base_model import choose_dtype

    dtype = choose_dtype(args.dtype, "cpu")
    print(f"dtype {dtype}" + (" (chosen for this CPU)" if args.dtype == "auto" else ""))
    if missing := missing_libraries():
        print(
            f"not preloaded: {', '.join(missing)}; every arm is slower without. `make bench-cpu` "
            "preloads what is installed (libiomp5 from the venv; Debian: libtcmalloc-minimal4)."
        )
    model = args.model or str(embedded_model_dir())
    engine_args = {
        "model": model,
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    facts = {
        "model": Path(model).name,
        "adapter": " ".join(Path(adapter).name for adapter in args.adapter),
        "dtype": dtype,
        **provenance(),
    }
    facts["max_tokens"] = args.max_tokens
    prompts = load_prompts(model)
    engines: list[Engine] = []
    with tempfile.TemporaryDirectory(prefix="cpu_throughput-") as logs:

        def start(arm: Arm) -> Engine:
            engine = Engine(arm, engine_args, Path(logs))
            engines.append(engine)
            return engine

        try:
            start(PLAIN)
            if args.row_cost:
                measured: list[tuple[dict[str, Any], list[Point]]] = []
                try:
                    for arm in args.arms:
                        engine = start(arm)
                        tqdm.write(f"{arm.name}: {engine.facts['block']}")
                        measured.append((engine.facts, compare(engines, prompts, args)))
                        engines.pop().close()
                finally:
                    if measured:  # starting engines takes long: what there is, is kept
                        report_row_cost(measured, facts, args)
            else:
                for arm in tqdm(args.arms, desc="starting BiTA", unit="arm"):
                    start(arm)
                report(engines, compare(engines, prompts, args), facts, args)
        finally:
            for engine in engines:
                engine.close()


if __name__ == "__main__":
    main()

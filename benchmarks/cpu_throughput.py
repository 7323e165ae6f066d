"""Output tokens per second of BiTA compared with plain vLLM on a CPU, at several concurrencies.

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
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_engines import PLAIN, Arm, Engine, Measurement, compute_on_every_core
from provenance import ROOT, preloaded, provenance

ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"
QUESTIONS = ROOT / "benchmarks" / "data" / "mt_bench_questions.jsonl"
RESULTS = ROOT / "benchmarks" / "results"
MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16
KV_CACHE_BYTES = 1 << 30
QUICK = {"concurrency": [1, 4], "prompts": 4, "repeats": 1, "max_tokens": 48}
ROW_COST_ROWS = (4, 8, 12, 16, 24, 32)

Spread = tuple[float, float, float]  # median, least, most

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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tree", action="append", metavar="TREE", help="a BiTA arm, repeatable: 'auto' (default), "
        "'auto:16' (at most 16 rows), widths per depth such as '5,4,3', or a template file")  # fmt: skip
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
        "the plot lies next to it")  # fmt: skip
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

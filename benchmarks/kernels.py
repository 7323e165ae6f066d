"""Time of tree attention beside its peers, and beside the least time that memory allows.

    python benchmarks/kernels.py                  # on a GPU: the whole sweep, about 400 points
    python benchmarks/kernels.py --quick          # on a CPU: the naive and SDPA rows, two minutes on one slow core

Every provider gets the same queries, KV cache and block tables, and its first output is compared with
float64. On a GPU a provider's calls for all layers are one CUDA graph, and replays are timed; on a CPU the calls
are timed as they are. The floor is the bytes that have to move at this machine's measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_cases import SHAPES, Case
from kernel_providers import PROVIDERS, Run, Unavailable
from provenance import ROOT, package_version, provenance
from tqdm import tqdm

SWEEP = {
    "context": [512, 4096, 32768],
    "requests": [1, 8, 64, 256],
    "rows": [1, 4, 16, 52],
    "shape": list(SHAPES),
}
QUICK = {"context": [512, 2048], "requests": [1, 4], "rows": [1, 4, 16], "shape": ["SmolLM2-135M"]}
REPEATS = 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PATIENCE = 4.0  # seconds that the repeats of one point may take

Row = dict[str, Any]


def seconds_of_a_pass(one_pass: Callable[[], None], device: torch.device) -> Iterator[float]:
    """Seconds of each repeat, endlessly: graph replays on a GPU, plain calls on a CPU."""
    one_pass()  # compiles
    if device.type != "cuda":
        while True:
            start = time.perf_counter()
            one_pass()
            yield time.perf_counter() - start
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        one_pass()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        yield begin.elapsed_time(end) / 1e3


def measure(run: Run, num_layers: int, device: torch.device) -> list[float]:
    """Microseconds of a layer, one figure a repeat."""

    def one_pass() -> None:
        for layer in range(num_layers):
            run(layer)

    begun, times = time.perf_counter(), []
    for seconds in itertools.islice(seconds_of_a_pass(one_pass, device), REPEATS):
        times.append(seconds / num_layers * 1e6)
        if len(times) >= 3 and time.perf_counter() - begun > PATIENCE:
            break
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read plus written by a large copy."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure(lambda _: target.copy_(source), 1, device)
    return 2 * size / (statistics.median(times) / 1e6)


def point(case: Case, provider: str, bandwidth: float) -> Row:
    """One row of the CSV, without what it shares with all others.

    Raises:
        Unavailable: the provider cannot run here, or has nothing to say about this case.
    """
    run = PROVIDERS[provider](case)
    error = case.error(run(0))
    times = sorted(measure(run, len(case.caches), case.device))
    floor, median = case.needed_bytes / bandwidth * 1e6, statistics.median(times)
    return {
        "shape": case.shape.name,
        "context": case.context,
        "requests": case.num_requests,
        "rows": case.num_rows,
        "provider": provider,
        "layers": len(case.caches),
        "time_us": round(median, 2),
        "time_us_p20": round(times[len(times) // 5], 2),
        "time_us_p80": round(times[len(times) * 4 // 5], 2),
        "bytes": case.needed_bytes,
        "floor_us": round(floor, 2),
        "share_of_floor": round(floor / median, 4),
        "error": f"{error:.1e}",
    }


def sweep(args: argparse.Namespace, bandwidth: float, left_out: Counter[str]) -> Iterator[Row]:
    """Every point that can be measured; counts the others, with the reason, in `left_out`."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    grid = list(itertools.product(args.shape, args.context, args.requests, args.rows))
    with tqdm(total=len(grid) * len(args.provider), unit="point") as progress:
        for name, context, requests, rows in grid:
            case = None  # the last one's memory goes first
            try:
                case = Case(SHAPES[name], context, requests, rows, dtype, device)
            except torch.OutOfMemoryError:
                left_out[f"every provider: {requests} requests of {context} do not fit"] += 1
                progress.update(len(args.provider))
                continue
            for provider in args.provider:
                progress.set_postfix_str(f"{name} {context} x {requests}, R={rows}, {provider}")
                try:
                    yield point(case, provider, bandwidth)
                except Unavailable as reason:
                    left_out[f"{provider}: {reason}"] += 1
                except torch.OutOfMemoryError:
                    left_out[f"{provider}: out of memory at {requests} requests of {context}"] += 1
                progress.update()


def plot(path: Path, rows: list[Row], device: str) -> None:
    """Time against requests: a line a provider, a panel for each context and R; the floor is dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    down = sorted({(row["shape"], row["rows"]) for row in rows})
    across = sorted({row["context"] for row in rows})
    figure, panels = plt.subplots(
        len(down), len(across), figsize=(3.6 * len(across), 2.6 * len(down)),
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for (i, (shape, num_rows)), (j, context) in itertools.product(
        enumerate(down), enumerate(across)
    ):
        axes = panels[i][j]
        here = [
            row
            for row in rows
            if (row["shape"], row["rows"], row["context"]) == (shape, num_rows, context)
        ]
        floor = sorted({(row["requests"], row["floor_us"]) for row in here})
        axes.plot(*zip(*floor, strict=True), color="grey", linestyle="--", label="floor")
        for color, provider in enumerate(providers):
            line = [
                (row["requests"], row["time_us"]) for row in here if row["provider"] == provider
            ]
            if line:
                axes.plot(*zip(*line, strict=True), marker="o", color=f"C{color}", label=provider)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = [requests for requests, _ in floor]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_title(f"{shape}, context {context}, R = {num_rows}", fontsize=8)
        if j == 0:
            axes.set_ylabel("µs a layer")
        if i == len(down) - 1:
            axes.set_xlabel("requests")
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(device, fontsize=9)
    figure.savefig(path, dpi=130)


def table(rows: list[Row]) -> str:
    """What the terminal gets."""
    names = ["shape", "context", "requests", "rows", "provider"]
    names += ["time_us", "floor_us", "share_of_floor", "error"]
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, values in SWEEP.items():
        kind = type(values[0])
        add(f"--{name}", nargs="+", type=kind, help=f"default: {' '.join(map(str, values))}")
    add(
        "--provider",
        nargs="+",
        choices=list(PROVIDERS),
        default=list(PROVIDERS),
        help="default: all",
    )
    add("--device", default="cuda" if on_gpu else "cpu", help="default: %(default)s")
    add("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32",
        help="default: %(default)s")  # fmt: skip
    add("--quick", action="store_true", help="a small sweep: "
        + ", ".join(f"{name} {' '.join(map(str, v))}" for name, v in QUICK.items()))  # fmt: skip
    add("--out", type=Path, help="CSV; the plot lies beside it "
        "(default: benchmarks/results/kernels_{cpu,cuda}.csv)")  # fmt: skip
    given = parser.parse_args()
    for name, values in (QUICK if given.quick else SWEEP).items():
        setattr(given, name, getattr(given, name) or values)
    if unknown := set(given.shape) - set(SHAPES):
        parser.error(f"--shape {' '.join(unknown)}: expected some of {', '.join(SHAPES)}")
    kind = torch.device(given.device).type
    given.out = given.out or ROOT / "benchmarks" / "results" / f"kernels_{kind}.csv"
    return given


def main() -> None:
    args = parse_args()
    facts: Row = {
        **provenance(),
        "triton": package_version("triton"),
        "xformers": package_version("xformers"),
    }
    if torch.device(args.device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(args.device)
    bandwidth = copy_bandwidth(torch.device(args.device))
    facts |= {"dtype": args.dtype, "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1)}
    print(
        f"{facts['device']}: a large copy moves {facts['copy_bandwidth_gb_s']} GB/s (read + written)"
    )
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    try:
        for row in sweep(args, bandwidth, left_out):
            rows.append(row)
    finally:
        for reason, count in left_out.items():
            print(f"no row at {count} points: {reason}")
        if rows:  # a sweep takes long: what there is, is kept
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=[*rows[0], *facts])
                writer.writeheader()
                writer.writerows({**row, **facts} for row in rows)
            plot(args.out.with_suffix(".png"), rows, f"{facts['device']}, {args.dtype}")
            print(f"\n{table(rows)}\n\nwritten: {args.out}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()

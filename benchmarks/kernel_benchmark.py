"""Time of tree attention, compared with its peers and with the least time that memory allows.

    python benchmarks/kernel_benchmark.py  # on a GPU: the whole sweep, about 600 points
    python benchmarks/kernel_benchmark.py --quick  # on a CPU: the naive and SDPA rows, two minutes on one slow core

Every provider gets the same queries, KV cache and block tables, and its first output is compared with
float64. On a GPU a provider's calls for all layers are one CUDA graph, and replays are timed; on a CPU the calls
are timed as they are. The floor is the bytes that have to move at this machine's measured copy bandwidth.
A row is written when it is measured; a point that fails is a row with the reason, and the sweep goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_cases import SHAPES, Case
from kernel_peers import Run, Unavailable
from kernel_providers import PROVIDERS, Provider
from provenance import ROOT, package_version, provenance
from tqdm import tqdm

SWEEP = {
    "context": [512, 4096, 32768, 130048],
    "requests": [1, 8, 64, 256],
    "rows": [1, 4, 16, 52],
    "shape": list(SHAPES),
}
QUICK = {"context": [512, 2048], "requests": [1, 4], "rows": [1, 4, 16], "shape": ["SmolLM2-135M"]}
REPEATS = 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PATIENCE = 4.0  # seconds that the repeats of one point may take
MEASURED = ("layers", "time_us", "time_us_p20", "time_us_p80", "bytes", "floor_us")
MEASURED += ("share_of_floor", "error", "failure")
FIELDS = (*SWEEP, "provider", *MEASURED)

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


def point(case: Case, provider: Provider, bandwidth: float) -> Row:
    """What is measured at one point of the sweep.

    Raises:
        Unavailable: the provider cannot run here, or has nothing to say about this case.
    """
    run = provider.make(case)
    error = case.error(run(0), provider.causal)
    times = sorted(measure(run, len(case.caches), case.device))
    floor, median = case.needed_bytes / bandwidth * 1e6, statistics.median(times)
    return {
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
    """A row for every point that was tried; counts the others, with the reason, in `left_out`."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    grid = list(itertools.product(args.context, args.shape, args.requests, args.rows))
    tried: Counter[str] = Counter()
    with tqdm(total=len(grid) * len(args.provider), unit="point", file=sys.stderr) as progress:
        for context, name, requests, rows in grid:
            case = None  # the last one's memory goes first
            try:
                case = Case(
                    SHAPES[name], context, requests, rows, dtype, device, args.max_model_len
                )
            except torch.OutOfMemoryError:
                left_out[f"every provider: {requests} requests of {context} do not fit"] += 1
                progress.update(len(args.provider))
                continue
            for key in args.provider:
                progress.set_postfix_str(f"{name} {context} x {requests}, R={rows}, {key}")
                progress.update()
                provider = PROVIDERS[key]
                if provider.most_cases and tried[key] == provider.most_cases:
                    left_out[f"{key}: measured in {provider.most_cases} cases"] += 1
                    continue
                row: Row = dict.fromkeys(FIELDS, "")
                place = (context, requests, rows, name, key)
                row |= dict(zip((*SWEEP, "provider"), place, strict=True))
                try:
                    row |= point(case, provider, bandwidth)
                except Unavailable as reason:
                    left_out[f"{key}: {reason}"] += 1
                    continue
                except Exception as failure:  # a peer's, or ours: the others go on
                    row["failure"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
                tried[key] += 1
                yield row
                if row["failure"] and (broken := broken_device(device)):
                    left_out[f"everything after it: {broken}"] += 1
                    return


def broken_device(device: torch.device) -> str:
    """Why no kernel runs any more (an illegal access ends a CUDA context), or ''."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


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
    add("--max-model-len", type=int, default=131072,
        help="longest sequence of the engine, which our splits follow from (default: %(default)s)")  # fmt: skip
    add("--quick", action="store_true", help="a small sweep: "
        + ", ".join(f"{name} {' '.join(map(str, v))}" for name, v in QUICK.items()))  # fmt: skip
    add("--out", type=Path, help="CSV; the plot lies next to it "
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
        "flashinfer": package_version("flashinfer-python"),
    }
    if torch.device(args.device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(args.device)
    bandwidth = copy_bandwidth(torch.device(args.device))
    facts |= {
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
    }
    print(
        f"{facts['device']}: a large copy moves {facts['copy_bandwidth_gb_s']} GB/s (read + written)"
    )
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*FIELDS, *facts])
        writer.writeheader()
        try:
            for row in sweep(args, bandwidth, left_out):
                rows.append(row)
                writer.writerow({**row, **facts})
                file.flush()  # a sweep that is killed keeps what it has
        finally:
            report(rows, left_out, args.out)
    measured = [row for row in rows if not row["failure"]]
    try:
        plot(args.out.with_suffix(".png"), measured, f"{facts['device']}, {args.dtype}")
    except ImportError:
        print("no plot: matplotlib does not import")


def report(rows: list[Row], left_out: Counter[str], path: Path) -> None:
    """Print what was measured, what failed and what was left out."""
    if measured := [row for row in rows if not row["failure"]]:
        print(f"\n{table(measured)}\n")
    for row in rows:
        if row["failure"]:
            print(f"failed: {' '.join(str(row[name]) for name in (*SWEEP, 'provider', 'failure'))}")
    for reason, count in left_out.items():
        print(f"no row at {count} points: {reason}")
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main()

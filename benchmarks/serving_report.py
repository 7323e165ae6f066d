"""From the rows of `serving.py` to ratios, intervals, plots and a Markdown report.

A row is one arm, dataset, concurrency and repeat. The report is made from the CSV alone:
`serving.py --report-only`.
"""

import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

PLAIN = "plain"
CONFIDENCE = 0.95

Row = dict[str, Any]
Interval = tuple[float, float]
Key = tuple[str, str, int, int]  # arm, dataset, concurrency, repeat


@dataclass(frozen=True)
class Point:
    """All repeats of one arm at one dataset and concurrency; medians, times in ms."""

    dataset: str
    concurrency: int
    arm: str
    repeats: int
    tokens_per_s: float
    ratio: float | None  # None: plain vLLM was not measured with it
    ratio_interval: Interval | None
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float | None  # None: no answer of more than one token
    tpot_p99_ms: float | None
    accepted_length: float | None
    rows: float | None
    different: int  # answers that are not plain vLLM's, over all repeats
    answers: int


def beside_plain(rows: Sequence[Row], answers: Mapping[Key, Sequence[str]]) -> list[Row]:
    """The rows with `ratio` and `different_answers`, both against plain vLLM of the same repeat.

    Empty where plain vLLM has not been measured.
    """
    rate = {_key(row): row["tokens_per_s"] for row in rows}
    result = []
    for row in rows:
        key = _key(row)
        plain_key = (PLAIN, *key[1:])
        ratio: float | str = ""
        different: int | str = ""
        if plain_key in rate:
            ratio = row["tokens_per_s"] / rate[plain_key]
        if key in answers and plain_key in answers:
            pairs = zip(answers[key], answers[plain_key], strict=True)
            different = sum(own != plain for own, plain in pairs)
        result.append({**row, "ratio": ratio, "different_answers": different})
    return result


def _key(row: Row) -> Key:
    return row["arm"], row["dataset"], row["concurrency"], row["repeat"]


def decode_figures(
    output_tokens: int, requests: int, accepted: int, drafted: int
) -> tuple[float | str, float | str]:
    """Accepted length, and rows that verified drafts (the root included): means over decode steps.

    Every request's first token comes from its prefill; every later step emits one token of its own
    and the drafts it accepted. Empty if there was no such step.
    """
    steps = output_tokens - requests - accepted
    if steps <= 0:
        return "", ""
    return (output_tokens - requests) / steps, 1 + drafted / steps


def interval(ratios: Sequence[float]) -> Interval | None:
    """95% confidence interval of the ratio (geometric mean): Student's t on the log ratios."""
    if len(ratios) < 2:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.mean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)
    return math.exp(middle - reach), math.exp(middle + reach)


def summarise(rows: Sequence[Row]) -> list[Point]:
    """One point for each dataset, concurrency and arm, in that order of first appearance."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["concurrency"], row["arm"]), []).append(row)
    points = []
    for (dataset, concurrency, arm), group in groups.items():
        ratios = [row["ratio"] for row in group if row["ratio"] != ""]
        compared = [row for row in group if row["different_answers"] != ""]
        points.append(
            Point(
                dataset,
                concurrency,
                arm,
                repeats=len(group),
                tokens_per_s=statistics.median(row["tokens_per_s"] for row in group),
                ratio=_median(ratios),
                ratio_interval=interval(ratios),
                **{
                    name: _median(row[name] for row in group)
                    for name in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
                },
                accepted_length=_median(row["accepted_length"] for row in group),
                rows=_median(row["rows"] for row in group),
                different=sum(row["different_answers"] for row in compared),
                answers=sum(row["prompts"] for row in compared),
            )
        )
    datasets, arms = list(dict.fromkeys(p.dataset for p in points)), arm_order(points)
    return sorted(
        points, key=lambda p: (datasets.index(p.dataset), p.concurrency, arms.index(p.arm))
    )


def _median(values: Any) -> float | None:
    measured = [value for value in values if value != ""]
    return statistics.median(measured) if measured else None


def arm_order(points: Sequence[Point]) -> list[str]:
    """Arms by first appearance, plain vLLM before all."""
    return sorted(dict.fromkeys(point.arm for point in points), key=lambda arm: arm != PLAIN)


def read_rows(path: Path) -> list[Row]:
    """The CSV's rows, numbers as numbers."""
    with path.open(newline="") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def report(path: Path) -> Path:
    """Write the Markdown report and the plots of a CSV next to it; return the report's path."""
    rows = read_rows(path)
    points = summarise(rows)
    ratio_plot, frontier_plot = (
        path.with_name(f"{path.stem}_{n}.png") for n in ("ratio", "frontier")
    )
    plot_ratio(ratio_plot, points)
    plot_frontier(frontier_plot, points)
    lines = [
        f"# Serving: {rows[0]['model']}, {rows[0]['dtype']}",
        f"*Made by `serving.py --report-only` from [{path.name}]({path.name}).* {_conditions(rows)}",
        "",
        f"![output tokens/s beside plain vLLM]({ratio_plot.name})",
        f"![output tokens/s against time per output token]({frontier_plot.name})",
    ]
    for dataset in dict.fromkeys(point.dataset for point in points):
        lines += ["", f"## {dataset}", *_table([p for p in points if p.dataset == dataset])]
    lines += ["", *NOTES]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


NOTES = (
    "- ratio: output tokens/s to plain vLLM's of the same repeat, same prompts; median over repeats, in brackets the",
    "  95% confidence interval (Student's t on the log ratios).",
    "- TTFT: time to first token, TPOT: time per output token after it; p50 / p99 over requests. These and all other",
    "  figures: medians over repeats.",
    "- accepted: tokens a request got per decode step, steps without drafts included (1.00: plain). Drafts accepted",
    "  beyond the end of an answer count, so short answers show a little too much.",
    "- rows: of a request in a decode step. BiTA: of its step block at that many requests; n-gram and suffix: 1 and",
    "  the drafted tokens.",
    "- different: answers whose text is not plain vLLM's (greedy). In fp32 only a near tie of the top two logits",
    "  explains one.",
)


def _conditions(rows: Sequence[Row]) -> str:
    first = rows[0]
    dates = sorted({str(row["date"])[:10] for row in rows})
    return (
        f"{first['device']}, vLLM {first['vllm']}, commit {str(first['git_sha'])[:12]}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; greedy, at most {first['max_tokens']} tokens "
        f"an answer, servers {first['servers']}, {1 + max(row['repeat'] for row in rows)} repeats."
    )


def _table(points: Sequence[Point]) -> list[str]:
    header = (
        "concurrent", "arm", "tokens/s", "ratio to plain", "TTFT ms", "TPOT ms", "accepted", "rows",
        "different",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for p in points:
        ratio = "" if p.ratio is None else f"**{p.ratio:.2f}**"
        if p.ratio_interval is not None and p.arm != PLAIN:
            ratio += f" [{p.ratio_interval[0]:.2f}, {p.ratio_interval[1]:.2f}]"
        cells = (
            str(p.concurrency),
            p.arm,
            f"{p.tokens_per_s:.1f}",
            ratio,
            f"{p.ttft_p50_ms:.0f} / {p.ttft_p99_ms:.0f}",
            "" if p.tpot_p50_ms is None else f"{p.tpot_p50_ms:.1f} / {p.tpot_p99_ms:.1f}",
            "" if p.accepted_length is None else f"{p.accepted_length:.2f}",
            "" if p.rows is None else f"{p.rows:.1f}".removesuffix(".0"),
            f"{p.different} of {p.answers}" if p.answers else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot_ratio(path: Path, points: Sequence[Point]) -> None:
    """Ratio to plain vLLM against concurrency, a panel a dataset; bars are the interval."""
    with _panels(path, points) as panels:
        for axes, dataset in panels:
            axes.axhline(1.0, color="grey", linestyle="--", label="plain vLLM")
            for color, arm in enumerate(arm_order(points)):
                series = [
                    p
                    for p in points
                    if (p.dataset, p.arm) == (dataset, arm) and p.ratio is not None
                ]
                if arm == PLAIN or not series:
                    continue
                middle = [p.ratio for p in series]
                ends = [p.ratio_interval or (p.ratio, p.ratio) for p in series]
                bars = [  # the median need not lie inside the interval of the mean
                    [max(m - low, 0) for m, (low, _) in zip(middle, ends, strict=True)],
                    [max(high - m, 0) for m, (_, high) in zip(middle, ends, strict=True)],
                ]
                x = [p.concurrency for p in series]
                axes.errorbar(x, middle, bars, marker="o", capsize=3, label=arm, color=f"C{color}")
            axes.set_xscale("log", base=2)
            ticks = sorted({p.concurrency for p in points})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set(xlabel="concurrent requests", ylabel="output tokens/s, to plain vLLM's")


def plot_frontier(path: Path, points: Sequence[Point]) -> None:
    """Output tokens/s against median time per output token; a line joins an arm's concurrencies."""
    with _panels(path, points) as panels:
        for axes, dataset in panels:
            for color, arm in enumerate(arm_order(points)):
                series = [
                    p
                    for p in points
                    if (p.dataset, p.arm) == (dataset, arm) and p.tpot_p50_ms is not None
                ]
                x, y = [p.tpot_p50_ms for p in series], [p.tokens_per_s for p in series]
                axes.plot(x, y, marker="o", label=arm, color=f"C{color}")
                for p in series:
                    axes.annotate(str(p.concurrency), (p.tpot_p50_ms, p.tokens_per_s), fontsize=7)
            axes.set(xlabel="time per output token, p50 (ms)", ylabel="output tokens/s")


@contextmanager
def _panels(path: Path, points: Sequence[Point]) -> Iterator[list[tuple[Any, str]]]:
    """Axes of each dataset; titled and saved to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    datasets = list(dict.fromkeys(point.dataset for point in points))
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(5.5 * len(datasets), 4.2), layout="constrained", squeeze=False
    )
    panels = list(zip(axes[0], datasets, strict=True))
    yield panels
    for panel, dataset in panels:
        panel.set_title(dataset, fontsize=9)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)

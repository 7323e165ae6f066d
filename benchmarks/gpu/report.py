"""What the throughput rows come to: medians, ratios with intervals, and what was published of EAGLE-3."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# tokens/s over plain vLLM's, an 8B on an H100, by requests; as its authors published them
EAGLE_3 = {1: 2.36, 8: 1.62, 16: 1.48, 64: 1.38}
# Student's t, two-sided 95%, by degrees of freedom
STUDENT_T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}
SHOWN = (
    "load", "requests", "plain tok/s", "bita tok/s", "ratio", "interval", "accepted", "plain ms",
    "bita ms", "accepted x plain/step", "plain tpot", "bita tpot", "EAGLE-3",
)  # fmt: skip


def ratios(rows: Sequence[Row], plain: str, published: dict[int, float]) -> list[Row]:
    """One line a load: medians over the repeats; the ratio is taken within a repeat.

    `published` is EAGLE-3's ratio by requests, where it is of a model as large.
    """
    points: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["tokens_per_second"] != "":
            arms = points.setdefault((row["load"], row["requests"]), {})
            arms.setdefault(row["arm"], {})[row["repeat"]] = row
    lines = []
    for (load, requests), arms in points.items():
        base = arms.get(plain, {})
        for arm, repeats in arms.items():
            if arm == plain:
                continue
            both = [repeat for repeat in repeats if repeat in base]
            line: Row = {"load": load, "requests": requests}
            line |= columns("bita", repeats.values()) | columns("plain", base.values())
            line["accepted"] = middle(repeats.values(), "accepted_length")
            if both:
                found = [rate(repeats[r]) / rate(base[r]) for r in both]
                line["ratio"] = f"{math.exp(statistics.mean(map(math.log, found))):.3f}"
                low, high = interval(found)
                line["interval"] = f"{low:.3f}-{high:.3f}" if high < math.inf else "one repeat"
                steps = [middle(x.values(), "step_ms") for x in (base, repeats)]
                line["accepted x plain/step"] = f"{line['accepted'] * steps[0] / steps[1]:.3f}"
            if load == "closed":
                line["EAGLE-3"] = published.get(int(requests), "")
            lines.append(line)
    return lines


def columns(arm: str, rows: Any) -> Row:
    """Medians of one arm."""
    rows = list(rows)
    if not rows:
        return {}
    return {
        f"{arm} tok/s": middle(rows, "tokens_per_second"),
        f"{arm} ms": middle(rows, "step_ms"),
        f"{arm} tpot": middle(rows, "tpot_ms"),
    }


def rate(row: Row) -> float:
    return float(row["tokens_per_second"])


def middle(rows: Any, name: str) -> float:
    """Median of a column, to three places."""
    return round(statistics.median(float(row[name]) for row in rows), 3)


def interval(found: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of a ratio (geometric mean): Student's t on the logs; endless for one repeat."""
    logs = [math.log(ratio) for ratio in found]
    if len(logs) < 2:
        return 0.0, math.inf
    reach = statistics.stdev(logs) / math.sqrt(len(logs)) * STUDENT_T[min(len(logs) - 1, 9)]
    return math.exp(statistics.mean(logs) - reach), math.exp(statistics.mean(logs) + reach)

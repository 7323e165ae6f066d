"""Step times of widths that take turns: which of them count, and the interval of their ratio (NumPy only)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from bita_vllm.tree.ladder import PLAIN_WIDTH

CONFIDENCE = 0.95
# CPU seconds a second of wall time that a step may lack compared with the best steps of its kind. If it lacks more, a
# neighbour had its cores for a part of it.
BUSY_LOSS = 0.04
BEST_SHARE = 0.9  # quantile of CPU seconds a second that stands for an undisturbed step


class StepTime(NamedTuple):
    """The time of one step, or the mean of a few that were timed together."""

    rows: float
    seconds: float
    cpu_seconds: float  # of all threads of the process


Round = Mapping[int, Sequence[StepTime]]  # by width; widths take turns within a round


@dataclass(frozen=True)
class Comparison:
    """A width's steps compared with plain ones.

    Attributes:
        rows: mean over its steps.
        ratio: its seconds to a plain step's, median over rounds.
        low, high: interval of the ratio, with CONFIDENCE.
    """

    rows: float
    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the interval, relative to the ratio."""
        return (self.high - self.low) / 2 / self.ratio


def compare_with_plain(rounds: Sequence[Round]) -> tuple[float, dict[int, Comparison]]:
    """Seconds of a plain step, and the comparison of every other width with it. Each round has all widths and plain.

    Steps that a neighbour disturbed are left out, and rounds in which a width has no others; if that leaves too few
    rounds for an interval, all steps count.
    """
    least = {width: _least_busy(rounds, width) for width in rounds[0]}
    kept = [
        {
            width: [t for t in times if t.cpu_seconds >= least[width] * t.seconds]
            for width, times in one.items()
        }
        for one in rounds
    ]
    quiet: Sequence[Round] = [one for one in kept if all(one.values())]
    if len(quiet) < min_rounds():
        quiet = rounds
    medians = {
        width: np.array([np.median([t.seconds for t in one[width]]) for one in quiet])
        for width in rounds[0]
    }
    plain = medians.pop(PLAIN_WIDTH)
    found = {}
    for width, seconds in medians.items():
        rows = float(np.mean([t.rows for one in rounds for t in one[width]]))
        ratios = seconds / plain
        found[width] = Comparison(rows, float(np.median(ratios)), *median_interval(ratios))
    return float(np.median(plain)), found


def _least_busy(rounds: Sequence[Round], width: int) -> float:
    """CPU seconds a second below which a step of this width was disturbed."""
    busy = [time.cpu_seconds / time.seconds for one in rounds for time in one[width]]
    return float(np.quantile(busy, BEST_SHARE)) * (1 - BUSY_LOSS)


def median_interval(
    # at least `min_rounds()` of them
    values: Sequence[float] | np.ndarray,
) -> tuple[float, float]:
    """Two of the values between which the median of what they are drawn from lies, with CONFIDENCE.

    These are order statistics: nothing is assumed of the distribution, and an outlier moves the interval by one value.
    """
    n, ordered = len(values), np.sort(values)
    # P(at most so many lie below it), of exact numbers: they outgrow 64 bits.
    at_most = [ways / 2**n for ways in accumulate(math.comb(n, k) for k in range(n + 1))]
    k = max(sum(p <= (1 - CONFIDENCE) / 2 for p in at_most), 1)
    return float(ordered[k - 1]), float(ordered[n - k])


def min_rounds() -> int:
    """Fewest values whose smallest and largest are an interval of the median, with CONFIDENCE."""
    return math.ceil(1 - math.log2(1 - CONFIDENCE))

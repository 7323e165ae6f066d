"""What steps take while serving, against what the ladder's measurements say."""

from __future__ import annotations

from typing import Any

import numpy as np

from bita_vllm.scheduling.timing import BUSY_LOSS
from bita_vllm.tree.ladder_search import PLAIN

# Steps that the expectation counts as beside what is seen.
PRIOR_STEPS = 4.0
FEW_STEPS = 8  # say nothing yet
MOST_STEPS = 128  # that are remembered of a kind: enough to be sure, few enough to fade in minutes
PRIOR_ERROR = 0.03  # standard error of an expectation, relative to it
# Of the CPU seconds a second of wall time that steps of a kind have at best: how much is forgotten a step, so that
# on a machine that is never quiet again steps count again.
BEST_FADES = 1e-3
LONGEST = 3.0  # times the mean: a step that took longer says nothing about its width
# Blocks that cost so much more or less than expected beside plain decoding: is it the rows, or the machine?
SUSPICIOUS = 0.1


class SeenCost:
    """Factors on the expected seconds of a step, learnt by width and octave of the batch size (1, 2-3, 4-7, ...).

    Plain decoding is the yardstick. Its factor in an octave is what the machine takes for everything there;
    what blocks cost beside it was measured side by side, so that is believed until steps with them were seen.
    Blocks seen to be dearer are taken for dearer at other batch sizes and widths too; cheaper ones are not:
    a wrong guess in that direction would make requests slower than no drafts.
    """

    def __init__(
        self,
        # [T+1, N] expected seconds, by template, plain decoding last, and batch size from 1 up
        expected: np.ndarray,
    ) -> None:
        self.expected = expected
        self._octave = np.log2(np.arange(1, expected.shape[1] + 1)).astype(int)  # [N]
        first = np.flatnonzero(np.diff(self._octave, prepend=-1))
        # [T+1, O] weight of an expectation, in seconds
        self._prior = PRIOR_STEPS * np.add.reduceat(expected, first, axis=1)
        self._prior /= np.bincount(self._octave)
        self._steps = np.zeros_like(self._prior)
        self._seen = np.zeros_like(self._prior)  # seconds
        self._expected = np.zeros_like(self._prior)  # seconds of the same steps
        self._squares = np.zeros_like(self._prior)  # of factors less the one that was found, summed
        self._busiest = np.zeros_like(self._prior)  # CPU seconds a second of wall time
        self._factors = np.ones_like(self._prior)

    def add(
        self,
        template: int,
        num_requests: int,
        seconds: float,
        share: float = 1.0,
        cpu_seconds: float | None = None,
    ) -> None:
        """A step of such blocks for a share of the requests, one row for the others; PLAIN for plain decoding.

        With `cpu_seconds` of the process, a step that a neighbour disturbed does not count.
        """
        octave = self._octave[num_requests - 1]
        cell = template, octave
        if cpu_seconds is not None:
            busy, best = cpu_seconds / seconds, self._busiest[cell] * (1 - BEST_FADES)
            self._busiest[cell] = max(best, busy)
            if busy < best * (1 - BUSY_LOSS):
                return
        of_rest = self._factors[PLAIN, octave] * self.expected[PLAIN, num_requests - 1]
        seen = seconds - (1 - share) * of_rest
        expected = share * self.expected[template, num_requests - 1]
        longest = LONGEST * self._seen[cell] * expected
        if self._steps[cell] < FEW_STEPS or seen * self._expected[cell] < longest:
            self._steps[cell] += share
            self._seen[cell] += seen
            self._expected[cell] += expected
            self._squares[cell] += (
                share * (seen / expected - self._seen[cell] / self._expected[cell]) ** 2
            )
            if self._steps[cell] > MOST_STEPS:
                self._keep(MOST_STEPS / self._steps[cell], cell)

    def fade(self, share: float) -> None:
        """Evidence so far counts so much less."""
        self._keep(share, ...)

    def _keep(self, share: float, cells: Any) -> None:
        for counts in (self._steps, self._seen, self._expected, self._squares):
            counts[cells] *= share

    def errors(self) -> np.ndarray:
        """`[T+1, N]` standard errors of `seconds`, relative to them."""
        squares = self._squares + PRIOR_STEPS**2 * PRIOR_ERROR**2
        return np.sqrt(squares)[:, self._octave] / (self._steps + PRIOR_STEPS)[:, self._octave]

    def seconds(self) -> np.ndarray:
        """`[T+1, N]` of a step as it is now, by template, plain decoding last, and batch size from 1 up."""
        prior = self._prior
        of_all = _factor(self._seen.sum(), self._expected.sum(), prior[PLAIN].mean(), 1.0)
        plain = _factor(
            self._seen[PLAIN], self._expected[PLAIN], prior[PLAIN], self._of_plain(of_all)
        )
        # Of blocks that are as dear beside plain as measured.
        standard = self._expected[:PLAIN] * plain
        seen = self._seen[:PLAIN]
        of_blocks = _factor(seen.sum(), standard.sum(), prior[:PLAIN].mean(), 1.0)
        of_width = _factor(
            seen.sum(axis=1), standard.sum(axis=1), prior[:PLAIN].mean(axis=1), of_blocks
        )
        blocks = _factor(
            seen, self._expected[:PLAIN], prior[:PLAIN], plain * np.maximum(of_width, 1.0)[:, None]
        )
        self._factors = np.vstack([blocks, plain])
        return self.expected * self._factors[:, self._octave]

    def knows_plain_steps(self, num_requests: int) -> bool:
        """Whether plain steps were seen of late, with about so many requests."""
        return bool(self._steps[PLAIN, self._octave[num_requests - 1]] >= FEW_STEPS)

    def needs_plain_steps(self, num_requests: int) -> bool:
        """Whether blocks took more or less than expected, and no plain step tells if it was the machine."""
        octave = self._octave[num_requests - 1]
        if self.knows_plain_steps(num_requests):
            return False
        seen = self._steps[:PLAIN, octave] >= FEW_STEPS
        beside_plain = self._factors[:PLAIN, octave][seen] / self._of_plain(1.0)
        return bool((np.abs(np.log(beside_plain)) > SUSPICIOUS).any())

    def _of_plain(self, drawn_to: float) -> float:
        """Factor of plain decoding over all batch sizes."""
        prior = self._prior[PLAIN].mean()
        seen, expected = self._seen[PLAIN].sum(), self._expected[PLAIN].sum()
        return float(_factor(seen, expected, prior, drawn_to))


def _factor(seen: Any, expected: Any, prior: Any, drawn_to: Any) -> Any:
    """Seen over expected seconds, drawn to a value with the weight of `prior` seconds."""
    return (seen + prior * drawn_to) / (expected + prior)

"""What steps take while serving, against what the ladder's measurements say.

A cell is a width w (a template's, or plain decoding) at an octave o of the batch size (1, 2-3, 4-7, ...). It has S
seen seconds, E seconds that were expected of the same steps, and K seconds of prior weight (a level of several cells
has their mean K). Its factor is a ratio of sums, shrunk towards a mean m:

    shrunk(S, E, K, m) = (S + K * m) / (E + K)

The mean of each level is the level before it. In two chains, from everything to one cell:

    machine:            a     = shrunk(all S, all E, K, 1)
    plain decoding:     b     = shrunk(plain S, plain E, K, a)
    plain, by octave:   p[o]  = shrunk(S[plain, o], E[plain, o], K, b)
    blocks:             c     = shrunk(S of blocks, E' of blocks, K, 1)     with E'[w, o] = E[w, o] * p[o]
    blocks, by width:   d[w]  = shrunk(S of w, E' of w, K, c)
    cell of blocks:   f[w, o] = shrunk(S[w, o], E[w, o], K, p[o] * max(d[w], 1))

Plain decoding is the yardstick: p says what the machine does to every step, and c and d what blocks cost relative to
plain steps. `max(d, 1)` holds that blocks seen to be dearer are dearer in other cells too, and cheaper ones are not:
a wrong guess in that direction would make requests slower than without drafts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bita_vllm.scheduling.timing import BUSY_LOSS
from bita_vllm.tree.ladder_search import PLAIN

# The expectation weighs as much as this many seen steps.
PRIOR_STEPS = 4.0
FEW_STEPS = 8  # fewer say nothing yet
# A cell remembers no more steps than this: enough to be sure, few enough to fade in minutes.
MOST_STEPS = 128
PRIOR_ERROR = 0.03  # standard error of an expectation, relative to it
# The best CPU seconds a second of wall time of a cell fade by this share a step, so that on a machine that is never
# quiet again its steps count again.
BEST_FADES = 1e-3
LONGEST = 3.0  # times the mean; a step that took longer says nothing about its width
# Logarithm of the ratio of seen to expected cost of blocks, relative to plain steps, from which on it has to be
# found out whether the rows or the machine are the reason.
SUSPICIOUS = 0.1


class SeenCost:
    """Factors on the expected seconds of a step, learnt by width and octave of the batch size."""

    def __init__(
        self,
        # [T+1, N] expected seconds, by template, plain decoding last, and batch size from 1 up
        expected: np.ndarray,
    ) -> None:
        self.expected = expected
        self._octave = np.log2(np.arange(1, expected.shape[1] + 1)).astype(int)  # [N]
        first = np.flatnonzero(np.diff(self._octave, prepend=-1))
        # [T+1, O] K: weight of an expectation, in seconds
        self._prior = PRIOR_STEPS * np.add.reduceat(expected, first, axis=1)
        self._prior /= np.bincount(self._octave)
        self._steps = np.zeros_like(self._prior)
        self._seen = np.zeros_like(self._prior)  # S
        self._expected = np.zeros_like(self._prior)  # E
        self._squares = np.zeros_like(self._prior)  # of deviations from the factor, summed
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
        """Count a step in which a share of the requests had such blocks and the others one row each.

        Args:
            template: of the blocks; PLAIN for plain decoding.
            num_requests: of the step.
            seconds: that it took.
            share: of the requests, those that had a block.
            cpu_seconds: of the process; where it is given, a step that a neighbour disturbed does not count.
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
        """Multiply the weight of all evidence so far by a share."""
        self._keep(share, ...)

    def _keep(self, share: float, cells: Any) -> None:
        for counts in (self._steps, self._seen, self._expected, self._squares):
            counts[cells] *= share

    def errors(self) -> np.ndarray:
        """`[T+1, N]` standard errors of `seconds`, relative to it."""
        squares = self._squares + PRIOR_STEPS**2 * PRIOR_ERROR**2
        return np.sqrt(squares)[:, self._octave] / (self._steps + PRIOR_STEPS)[:, self._octave]

    def seconds(self) -> np.ndarray:
        """`[T+1, N]` seconds of a step as it is now, by template, plain decoding last, and batch size from 1 up."""
        prior = self._prior
        of_machine = _shrunk(self._seen.sum(), self._expected.sum(), prior[PLAIN].mean(), 1.0)
        plain = _shrunk(
            self._seen[PLAIN], self._expected[PLAIN], prior[PLAIN], self._of_plain(of_machine)
        )
        # E': what blocks would take if they cost, relative to plain steps, what was measured.
        standard = self._expected[:PLAIN] * plain
        seen = self._seen[:PLAIN]
        of_blocks = _shrunk(seen.sum(), standard.sum(), prior[:PLAIN].mean(), 1.0)
        of_width = _shrunk(
            seen.sum(axis=1), standard.sum(axis=1), prior[:PLAIN].mean(axis=1), of_blocks
        )
        cells = _shrunk(
            seen, self._expected[:PLAIN], prior[:PLAIN], plain * np.maximum(of_width, 1.0)[:, None]
        )
        self._factors = np.vstack([cells, plain])
        return self.expected * self._factors[:, self._octave]

    def knows_plain_steps(self, num_requests: int) -> bool:
        """Whether plain steps were seen lately in the octave of that number of requests."""
        return bool(self._steps[PLAIN, self._octave[num_requests - 1]] >= FEW_STEPS)

    def needs_plain_steps(self, num_requests: int) -> bool:
        """Whether blocks took more or less than expected, and no plain step tells whether the machine is the reason."""
        octave = self._octave[num_requests - 1]
        if self.knows_plain_steps(num_requests):
            return False
        seen = self._steps[:PLAIN, octave] >= FEW_STEPS
        over_plain = self._factors[:PLAIN, octave][seen] / self._of_plain(1.0)
        return bool((np.abs(np.log(over_plain)) > SUSPICIOUS).any())

    def _of_plain(self, mean: float) -> float:
        """Factor of plain decoding over all batch sizes, shrunk towards a mean."""
        prior = self._prior[PLAIN].mean()
        seen, expected = self._seen[PLAIN].sum(), self._expected[PLAIN].sum()
        return float(_shrunk(seen, expected, prior, mean))


def _shrunk(seen: Any, expected: Any, prior: Any, mean: Any) -> Any:
    """Seen over expected seconds, shrunk towards a mean that weighs `prior` seconds."""
    return (seen + prior * mean) / (expected + prior)

"""How likely copied tokens are right: by the length of the match, corrected by what a request took before.

With m tokens in a row that agree with the text (the match, and the copies before this one), s = STRENGTH:

    odds(the next one agrees) = m / 2 * (hits + s) / (expected hits + s) / ((misses + s) / (expected misses + s))

m / 2, that is P = m / (m + 2), was measured: greedy answers of SmolLM2-135M-Instruct to Spec-Bench, `spec_bench.py
chances`. It has no table to fit, tells held-out tasks better than a fitted table by length of match and place in the
copy does, and needs no adapter. Hits and misses are of the request's own copies, whether a block held them or not,
compared with the tokens that were then emitted; expected are those that m / (m + 2) said. Old ones fade. So a request
whose copies are wrong loses them, and one whose copies are right gets longer ones.

NumPy, for the CPU runner; `kernels/find_copies.py` has the same on a device.
"""

from __future__ import annotations

import numpy as np

MAX_COPIES = 15
PRIOR = 2.0  # m agreeing tokens are m : PRIOR for the next
STRENGTH = 4.0  # tokens that the correction has to be seen in before it counts half
KEPT = 0.98  # of the evidence, from copy to copy


class CopyChance:
    """Keeps each slot's evidence; a slot is a request's, from step to step."""

    def __init__(self, num_slots: int) -> None:
        self._length = np.zeros(num_slots, dtype=np.int64)  # of the last copy's match
        # hits, expected hits, misses, expected misses
        self._evidence = np.zeros((num_slots, 4), dtype=np.float32)

    def forget(self, slots: np.ndarray) -> None:
        """Other requests have these slots now."""
        self._length[slots] = 0
        self._evidence[slots] = 0.0

    def count(
        self,
        # [B]
        slots: np.ndarray,
        # [B, 2] tokens of the last copy that the text took since, and 1 if it then took another one
        outcome: np.ndarray,
    ) -> None:
        """Add what became of the slots' last copies."""
        taken, refused = outcome[:, 0], outcome[:, 1]
        place = np.arange(MAX_COPIES)
        judged = place < (taken + refused)[:, None]
        expected = np.where(judged, agreement(self._length[slots, None] + place), 0.0)
        hits = expected.sum(axis=1)
        new = np.stack([taken, hits, refused, taken + refused - hits], axis=1)
        kept = np.where(taken + refused > 0, KEPT, 1.0)[:, None]
        self._evidence[slots] = self._evidence[slots] * kept + new

    def __call__(
        self,
        # [B]
        slots: np.ndarray,
        # [B] tokens of each match, 0 without one
        length: np.ndarray,
    ) -> np.ndarray:
        """`[B, MAX_COPIES]` float32 P(copied token i is right | those before it are); zeros without a match."""
        self._length[slots] = length
        hits, expected_hits, misses, expected_misses = self._evidence[slots].T + STRENGTH
        correction = hits * expected_misses / (expected_hits * misses)
        odds = (length[:, None] + np.arange(MAX_COPIES)) / PRIOR * correction[:, None]
        chance: np.ndarray = np.where(length[:, None] > 0, odds / (1 + odds), 0.0)
        return chance.astype(np.float32)


def agreement(
    # any shape
    agreeing: np.ndarray,
) -> np.ndarray:
    """P(the next token agrees, too), of a request that nothing is known of."""
    share: np.ndarray = agreeing / (agreeing + PRIOR)
    return share

"""How likely copied tokens are right, request by request: NumPy, for the CPU runner (`bita_kernels.copy_rules`).

`kernels/find_copies.py` has the same on a device.
"""

from __future__ import annotations

import numpy as np
from bita_kernels.copy_rules import KEPT, MAX_COPIES, PRIOR, STRENGTH


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

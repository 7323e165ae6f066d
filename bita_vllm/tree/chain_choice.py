"""How many copied tokens each request's next block takes where copies alone draft: those that are worth their rows.

A row costs the same whatever the step has, a share of what a step of one row takes. With B requests a token of plain
decoding costs (1 + share (B - 1)) / B of such a step. A copied token is worth its row where

    P(it is reached) > share * B / (1 + share (B - 1))

so that a request without a match has no block, and few of the tokens after a short match are tried.
"""

from __future__ import annotations

import numpy as np
import torch

from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template import NO_BLOCK


class ChainChoice:
    """The choice among the lines of a ladder of `copies_alone`, with the calls of `LineChoice`."""

    def __init__(self, ladder: Ladder, row_share: float) -> None:
        """
        Args:
            ladder: its sets have a chain of every length, the longest first.
            row_share: a row's cost, of a step of one row; 0: every token with a chance is tried.
        """
        self._longest = ladder.widths
        self._first_line = np.cumsum([0, *self._longest[:-1]]).tolist()
        self._row_share = row_share

    def __call__(
        self,
        index: int,
        # [B] int, depths that masks have candidates for: none
        depths: torch.Tensor,
        # [B, as many depths as the set has or more, ranks] P(the copied token, of the last rank, is right | those
        # before it are)
        chance: torch.Tensor,
    ) -> torch.Tensor:
        """`[B]` int64, line of the table for each request's next block, of set `index`; NO_BLOCK for none."""
        del depths
        num_requests, longest = len(chance), self._longest[index]
        price = self._row_share * num_requests / (1 + self._row_share * (num_requests - 1))
        reach = chance[:, :longest, -1].cumprod(dim=1)
        length = (reach > price).sum(dim=1)
        line = self._first_line[index] + longest - length
        return torch.where(length > 0, line, NO_BLOCK)

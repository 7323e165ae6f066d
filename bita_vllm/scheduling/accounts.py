"""Accounts of requests: the tokens that a request's blocks won, less the tokens that their rows cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bita_vllm.tree import TemplateTable

# Tokens that a request's blocks may lose before it rests, and the most that they may save up.
LIMIT = 3.0
CREDIT = 1.5  # tokens that a trial may lose
FIRST_REST = 32  # steps of one row; every trial that fails doubles it
LONGEST_REST = 1024


class Accounts:
    """The accounts of a step's requests. A request whose blocks lose gets one row for a while, then a trial.

    A block wins its accepted draft tokens, and costs the tokens that its rows would have brought in plain decoding:

        balance += accepted draft tokens - price * (rows of the block - 1)

    A request with an overdrawn balance rests. An account is closed at the first step without its request.
    """

    def __init__(self, table: TemplateTable) -> None:
        self._won = table.depth.astype(np.float64)  # tokens, by line and last node
        self._rows = table.num_rows - 1.0  # without the root, by line
        self._requests: list[str] = []
        # of each request of the last step
        self._balance = np.zeros(0)
        self._rest = np.zeros(0, dtype=np.int64)  # steps still to go without a block
        self._next_rest = np.zeros(0, dtype=np.int64)

    @property
    def resting(self) -> list[str]:
        """Requests of the last step that get no block in the next one."""
        return [self._requests[i] for i in np.flatnonzero(self._rest).tolist()]

    def settle(
        self,
        # of the step, in any order
        requests: Sequence[str],
        # [B] line of the template table, -1 without a block
        lines: np.ndarray,
        # [B] row where the walk stopped
        last_nodes: np.ndarray,
        # tokens that every row but the root has to bring
        price: float,
    ) -> None:
        """Book a step: what its blocks won and cost."""
        self._follow(requests)
        self._rest -= self._rest > 0
        gain = self._won[lines, last_nodes] - price * self._rows[lines]
        self._balance += np.where(lines >= 0, gain, 0.0)
        overdrawn, saved = self._balance <= -LIMIT, self._balance >= LIMIT
        self._rest[overdrawn] = self._next_rest[overdrawn]
        self._next_rest[overdrawn] = np.minimum(2 * self._next_rest[overdrawn], LONGEST_REST)
        self._next_rest[saved] = FIRST_REST
        self._balance[overdrawn] = CREDIT - LIMIT
        self._balance[saved] = LIMIT

    def _follow(self, requests: Sequence[str]) -> None:
        """Put the accounts in the order of these requests."""
        if requests == self._requests:
            return
        place = {request: i for i, request in enumerate(self._requests)}
        index = np.array([place.get(request, -1) for request in requests], dtype=np.int64)
        known = index >= 0
        before = self._balance, self._rest, self._next_rest
        new = (0.0, 0, FIRST_REST)
        self._balance, self._rest, self._next_rest = (
            np.where(known, np.append(kept, start)[index], start)
            for kept, start in zip(before, new, strict=True)
        )
        self._requests = list(requests)

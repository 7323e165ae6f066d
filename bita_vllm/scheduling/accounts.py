"""Which requests' blocks pay: each has an account of the tokens that its blocks won and of what their rows cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bita_vllm.tree import TemplateTable

# Tokens that a request's blocks may lose before it goes without, and all that they may save up.
LIMIT = 3.0
CREDIT = 1.5  # tokens that a trial may lose
FIRST_REST = 32  # steps of one row; every trial that fails doubles it
LONGEST_REST = 1024


class Accounts:
    """Requests whose blocks lose get one row for a while, then a trial.

    A block wins its accepted draft tokens, and costs what its rows would have brought in plain decoding. An account
    that is overdrawn rests. What is known of a request ends with the first step that it is not in.
    """

    def __init__(self, table: TemplateTable) -> None:
        self._won = table.depth.astype(np.float64)  # tokens, by line and last node
        self._rows = table.num_rows - 1.0  # beside the root, by line
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
        # tokens that a row beside the root has to bring
        price: float,
    ) -> None:
        """Book a step."""
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
        """Accounts in the order of these requests."""
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

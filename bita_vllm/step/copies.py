"""Copies on the host: for each request the tokens that followed where its last tokens occurred before.

Prompt and output count, also the part of a prompt whose KV came from a cache or is still to be computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from bita_kernels import cpu_kernels
from bita_kernels.copy_rules import MAX_COPIES

from bita_vllm.step.copy_chance import CopyChance

# Places that a search compares with the text's end, the last ones first: of Spec-Bench's answers more bring nothing.
MAX_PLACES = 16
MAX_HEADS = 1 << 16


class CopyIndex:
    """Indexes the texts of requests as they grow, and copies from them.

    A text takes 4 bytes a token once it is indexed, and two tables of about `max_model_len` times 4 bytes each, 512 KiB
    together at most.
    """

    def __init__(self, max_num_reqs: int, max_model_len: int) -> None:
        cpu_kernels.register()
        heads = min(MAX_HEADS, 1 << max_model_len.bit_length())
        self.chance = CopyChance(max_num_reqs)
        # Not filled: memory that no text has used yet is not there yet.
        self._head = torch.empty(max_num_reqs, 2, heads, dtype=torch.int32)
        self._previous = torch.empty(max_num_reqs, max_model_len, dtype=torch.int32)
        self._state = torch.zeros(max_num_reqs, 4, dtype=torch.int32)
        self._copies = torch.empty(max_num_reqs, MAX_COPIES, dtype=torch.int64)
        self._length = torch.empty(max_num_reqs, dtype=torch.int64)
        self._outcome = torch.empty(max_num_reqs, 2, dtype=torch.int32)
        self._slots: dict[str, int] = {}  # the request that was longest in no step comes first
        self._free = list(range(max_num_reqs))[::-1]

    def __call__(
        self,
        # B of them, each once
        request_ids: Sequence[str],
        # [B or more, max_model_len] int32, row b: prompt and output of request b
        token_ids: torch.Tensor,
        # [B] tokens of these
        num_tokens: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[B, MAX_COPIES]` int64 copied tokens, and `[B, MAX_COPIES]` float32 chances.

        A chance is P(the token is right | those before it are); 0 without a match. The tokens are overwritten by the
        next call.
        """
        num_requests = len(request_ids)
        slots = self._slots_of(request_ids)
        copies, length = self._copies[:num_requests], self._length[:num_requests]
        outcome = self._outcome[:num_requests]
        torch.ops.bita.find_copies_cpu(
            token_ids,
            torch.from_numpy(num_tokens.astype(np.int64)),
            torch.from_numpy(slots),
            MAX_PLACES,
            self._head,
            self._previous,
            self._state,
            copies,
            length,
            outcome,
        )
        self.chance.count(slots, outcome.numpy())
        return copies.numpy(), self.chance(slots, length.numpy())

    def _slots_of(self, request_ids: Sequence[str]) -> np.ndarray:
        """`[B]` int64 slot of each request.

        A request without one takes a free slot, or that of a request outside the step. Nobody has to say when a request
        ends, and one that comes back is indexed anew.
        """
        slots = self._slots
        new = [one for one in request_ids if one not in slots]
        if len(new) < len(request_ids):
            for one in request_ids:
                if one in slots:
                    slots[one] = slots.pop(one)
        if new:
            self._give_slots(new)
        return np.fromiter((slots[one] for one in request_ids), np.int64, len(request_ids))

    def _give_slots(self, request_ids: Iterable[str]) -> None:
        given = []
        for one in request_ids:
            if not self._free:
                self._free.append(self._slots.pop(next(iter(self._slots))))
            self._slots[one] = self._free.pop()
            given.append(self._slots[one])
        self._state[given] = 0
        self.chance.forget(np.array(given))

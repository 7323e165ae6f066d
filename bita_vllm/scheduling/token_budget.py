"""What of a step's token budget goes to blocks: what root rows and prefill leave.

A root row is the token that plain vLLM would compute; the rest of a block is optional work. So the width that is asked
for fits the budget, and where requests came in since it was asked for, blocks are left out, the latest request's first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bita_vllm.tree.ladder import PLAIN_WIDTH

if TYPE_CHECKING:
    from vllm.v1.request import Request


def within_budget(
    # [max_num_seqs + 1] width by number of requests
    lookup: Sequence[int],
    # that there are templates for, ascending
    widths: Sequence[int],
    budget: int,
) -> list[int]:
    """Return the same table, with the next narrower width that fits where a step's rows exceed the budget."""
    num_requests = np.arange(len(lookup))
    choices = np.array([PLAIN_WIDTH, *widths])
    fits = num_requests[:, None] * (choices + 1) <= budget
    fits[:, 0] = True
    allowed = fits & (choices <= np.asarray(lookup)[:, None])
    return np.where(allowed, choices, PLAIN_WIDTH).max(axis=1).tolist()


def leave_out_blocks(running: Sequence[Request], budget: int, num_prefill_tokens: int) -> None:
    """Take the drafts from the latest requests whose blocks do not fit.

    Args:
        running: in vLLM's order; each one keeps its root row.
        budget: tokens of the step.
        num_prefill_tokens: that plain vLLM would compute in the step, if the budget allows.
    """
    left = budget - num_prefill_tokens - len(running)
    for request in running:
        left -= len(request.spec_token_ids)
        if left < 0:
            left += len(request.spec_token_ids)
            request.spec_token_ids = []


def prefill_tokens(
    running: Iterable[Request],
    # in the order in which they come in
    waiting: Iterable[Request],
    budget: int,
    # requests that may still come in
    num_seats: int,
    # tokens that the KV cache has room for
    num_free_slots: int,
    # most tokens of one prompt in a step
    longest_chunk: int,
) -> int:
    """Return the prompt tokens that plain vLLM would compute in a step, at most `budget`."""
    num_tokens = sum(
        min(request.num_tokens - request.num_computed_tokens, longest_chunk) - 1
        for request in running
        if request.is_prefill_chunk
    )
    for seat, request in enumerate(waiting):
        missing = request.num_tokens - request.num_computed_tokens
        num_free_slots -= missing
        if num_tokens >= budget or seat >= num_seats or num_free_slots < 0:
            break
        num_tokens += min(missing, longest_chunk)
    return min(num_tokens, budget)

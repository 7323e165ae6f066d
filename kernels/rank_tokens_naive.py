"""The specification of `rank_tokens`: the same arguments, in torch, one request after the other."""

from __future__ import annotations

import torch

from .candidates import Candidates
from .rank_tokens import Ranking


def rank_tokens_naive(
    logits: torch.Tensor,
    logits_rows: torch.Tensor,
    most_depths: int,
    chances: bool,
    ranking: Ranking,
    candidates: Candidates,
) -> None:
    """As `rank_tokens`; the scratch memory is not used."""
    num_ranks = candidates.tokens.shape[2]
    for request, available in enumerate(candidates.depths.clamp(max=most_depths).tolist()):
        rows = logits[logits_rows[request, :available]]
        # A stable sort keeps equal logits in the order of their ids; NaN sorts as the greatest.
        order = torch.sort(rows, dim=-1, descending=True, stable=True).indices[:, :num_ranks]
        candidates.tokens[request, :available] = order
        if chances:
            candidates.chance[request, :available] = rows.float().softmax(dim=-1).gather(1, order)

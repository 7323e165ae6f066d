"""The specification of `find_copies`: the same arguments, in torch, one request after the other."""

from __future__ import annotations

import numpy as np
import torch

from .copy_rules import KEPT, MAX_COPIES, PRIOR, STRENGTH
from .find_copies import CopyState
from .find_copies_cpu_naive import longest_match


def find_copies_naive(
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    slots: torch.Tensor,
    state: CopyState,
    copies: torch.Tensor,
    chances: torch.Tensor,
) -> None:
    """As `find_copies`; the scratch memory is not used."""
    place = torch.arange(MAX_COPIES, dtype=torch.float32)
    for request, slot in enumerate(slots.tolist()):
        text = token_ids[slot, : int(num_tokens[slot])].cpu().numpy()
        seen, *pair, length, copy_from = state.last[slot].tolist()
        if 2 <= seen <= len(text) and text[seen - 2 : seen].tolist() == pair:
            emitted = text[seen:][:MAX_COPIES]
            same = text[copy_from : copy_from + len(emitted)] == emitted
            taken = int(np.cumprod(same).sum())
            judged = min(taken + 1, len(emitted)) if length else 0
            taken = min(taken, judged)
            agreeing = length + place[:judged]
            expected = float((agreeing / (agreeing + PRIOR)).sum())
            new = torch.tensor([taken, expected, judged - taken, judged - expected])
            state.evidence[slot] *= KEPT if judged else 1.0
            state.evidence[slot] += new.to(state.evidence)
        else:
            state.evidence[slot] = 0.0
        length, copy_from = longest_match(text, range(len(text) - 2, -1, -1))
        copy_from = max(copy_from, 0)
        before = [0, 0, *text.tolist()]
        state.last[slot] = torch.tensor([len(text), *before[-2:], length, copy_from])
        hits, expected_hits, misses, expected_misses = state.evidence[slot].cpu() + STRENGTH
        odds = (length + place) / PRIOR * (hits * expected_misses / (expected_hits * misses))
        copied = text[copy_from:] if length else np.zeros(1, dtype=np.int32)
        copies[request] = torch.from_numpy(np.resize(copied, MAX_COPIES))
        chances[request] = odds / (1 + odds) if length else 0.0

"""A source of drafts for tests: the same tokens for every request, whatever the step."""

from __future__ import annotations

from typing import Any

import torch
from bita_kernels.candidates import Candidates

CHANCE, FIRST_TOKEN = 0.5, 5


def constant_candidates(
    num_requests: int, num_depths: int, num_ranks: int, device: torch.device | str
) -> Candidates:
    """Token 5 + r at rank r, at every depth."""
    candidates = Candidates.empty(num_requests, num_depths, num_ranks, device)
    candidates.tokens.copy_(FIRST_TOKEN + torch.arange(num_ranks))
    candidates.chance.fill_(CHANCE)
    candidates.depths.fill_(num_depths)
    return candidates


class ConstantOnCPU:
    def __init__(self, vllm_config: Any, compute_logits: Any) -> None:
        """Nothing to compute."""

    def __call__(self, step: Any, hidden_states: Any, templates: Any) -> Candidates:
        # one depth more than the templates have
        sizes = templates.max_depth + 1, templates.max_rank
        return constant_candidates(step.batch.num_reqs, *sizes, "cpu")


class ConstantOnGPU:
    def __init__(self, compute_logits: Any, trees: Any, req_states: Any, vocab_size: int) -> None:
        table = trees.table
        sizes = table.max_depth + 1, table.max_rank, table.device
        self.candidates = constant_candidates(req_states.max_num_reqs, *sizes)

    def __call__(self, step: Any, hidden_states: Any, set_index: int) -> Candidates:
        return self.candidates.of(slice(0, step.batch.num_reqs))

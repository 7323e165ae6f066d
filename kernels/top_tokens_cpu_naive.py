"""The most likely tokens of rows of logits: the twin of `top_tokens_cpu` (top_tokens_cpu.cpp)."""

from __future__ import annotations

import torch


def top_tokens_cpu_naive(
    # [N, V]
    logits: torch.Tensor,
    # [n] int64
    rows: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, k]` int64 tokens of these rows, most likely first, and `[n, k]` fp32 their probabilities."""
    top = logits[rows].float().softmax(dim=-1).topk(k, dim=-1)
    return top.indices, top.values

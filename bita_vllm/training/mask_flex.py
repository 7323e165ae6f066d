"""Attention of mask rows through torch's FlexAttention, for GPUs: one fused kernel that skips the
blocks no row of which may be seen. The rule of who sees whom is `visible`; the same as the tiles of
mask_attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def make_block_mask(
    # [B, G] positions of the roots
    roots: torch.Tensor,
    num_masks: int,
    num_prompt_tokens: int,
    context_length: int,
    window: int | None,
) -> BlockMask:
    """Blocks of [G*k mask rows] x [prompt tokens | context | mask rows]."""
    batch, num_groups = roots.shape
    rows = num_groups * num_masks
    keys = num_prompt_tokens + context_length + rows
    rule = visible(roots, num_masks, num_prompt_tokens, context_length, window)
    return create_block_mask(rule, batch, None, rows, keys, device=roots.device)


def visible(
    # [B, G]
    roots: torch.Tensor,
    num_masks: int,
    num_prompt_tokens: int,
    context_length: int,
    window: int | None,
) -> Callable[..., torch.Tensor]:
    """(sequence, head, row, key) -> whether the row sees the key.

    What differs from batch to batch is in tensors: a number would be compiled in, once for each length.
    """
    first_rows = roots.new_full(roots.shape[:1], num_prompt_tokens + context_length)

    def rule(
        sequence: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        group, place = row // num_masks, row % num_masks + 1
        root, first_row = roots[sequence, group], first_rows[sequence]
        position = key - num_prompt_tokens
        of_prompt = key < num_prompt_tokens
        of_context = (key >= num_prompt_tokens) & (key < first_row) & (position <= root)
        other_group, other_place = (key - first_row) // num_masks, (key - first_row) % num_masks + 1
        of_group = (key >= first_row) & (other_group == group) & (other_place <= place)
        if window is not None:
            of_context = of_context & (root + place - position < window)
            of_group = of_group & (place - other_place < window)
        return of_prompt | of_context | of_group

    return rule


def attend(
    # [B, Hq, rows, D]
    query: torch.Tensor,
    # [B, Hkv, keys, D]
    key: torch.Tensor,
    # [B, Hkv, keys, D]
    value: torch.Tensor,
    block_mask: BlockMask,
    scaling: float,
    softcap: float | None,
    # [Hq], logits of attention sinks
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, Hq, rows, D]`.

    With sinks: attention without them times the share of its softmax, `sigmoid(log_sum - sink)`.
    """
    kernel: Any = _compiled() if query.is_cuda else flex_attention
    attended = kernel(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=sinks is not None,
    )
    if sinks is None:
        return attended
    output, log_sum = attended
    share = torch.sigmoid(log_sum - sinks[:, None].to(log_sum.dtype))
    return output * share[..., None].to(output.dtype)


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)

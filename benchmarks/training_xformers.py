"""Attention of mask rows by xFormers' `memory_efficient_attention`, where `bita train` has FlexAttention.

An arm of training_throughput.py. The rule of who sees whom is FlexAttention's (mask_flex.visible) as a dense bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bita_vllm.training import mask_attention, mask_flex

# (query [B, M, H, D], key [B, K, H, D], value, attn_bias [B, H, M, K], scale) -> [B, M, H, D]
Attention = Callable[..., torch.Tensor]


def sees(
    # [B, G] positions of the roots
    roots: torch.Tensor,
    num_masks: int,
    num_prompt_tokens: int,
    context_length: int,
    window: int | None,
) -> torch.Tensor:
    """`[B, G*k mask rows, prompt tokens | context | mask rows]` bool; takes make_block_mask's place."""
    batch, rows = roots.shape[0], roots.shape[1] * num_masks
    keys = num_prompt_tokens + context_length + rows
    rule = mask_flex.visible(roots, num_masks, num_prompt_tokens, context_length, window)
    sequence, row, key = (torch.arange(n, device=roots.device) for n in (batch, rows, keys))
    # After its own rows a group may be past the last one; what is looked up there is never used.
    return rule(sequence[:, None, None], row[:1], row[:, None], key)


def attention_by(kernel: Attention) -> Callable[..., torch.Tensor]:
    """What takes mask_flex.attend's place."""

    def attend(
        # [B, Hq, rows, D]
        query: torch.Tensor,
        # [B, Hkv, keys, D]
        key: torch.Tensor,
        # [B, Hkv, keys, D]
        value: torch.Tensor,
        # [B, rows, keys] bool
        visible: torch.Tensor,
        scaling: float,
        softcap: float | None,
        # [Hq]
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if softcap is not None or sinks is not None:
            raise NotImplementedError("memory_efficient_attention has no softcap and no sinks")
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        # Its kernels want rows of a bias that begin at multiples of eight.
        padded = -(-visible.shape[2] // 8) * 8
        bias = query.new_zeros(*visible.shape[:2], padded)[..., : visible.shape[2]]
        bias.masked_fill_(~visible, float("-inf"))
        bias = bias[:, None].expand(-1, query.shape[1], -1, -1)
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return kernel(*rows, attn_bias=bias, scale=scaling).transpose(1, 2)

    return attend


@contextmanager
def in_place_of_flex(kernel: Attention) -> Iterator[None]:
    """`kernel` is what mask rows attend by, on every device."""
    names = {mask_attention: ("use_flex",), mask_flex: ("make_block_mask", "attend")}
    before = {(owner, name): getattr(owner, name) for owner in names for name in names[owner]}
    mask_attention.use_flex = lambda query: True
    mask_flex.make_block_mask, mask_flex.attend = sees, attention_by(kernel)  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def xformers_kernel() -> Attention:
    """xFormers' own; raises ImportError."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention

"""Accepted rows move to their slots in vLLM's CPU cache: the twin of `move_kv_cpu` (move_kv_cpu.cpp)."""

from __future__ import annotations

import torch


def move_kv_cpu_naive(
    # a layer each: [num_blocks, Hkv, block_size, 2 * D]: keys [D, block_size], then values [block_size, D]; changed
    kv_caches: list[torch.Tensor],
    # [M] int64 slots: block * block_size + offset
    source: torch.Tensor,
    # [M] int64
    target: torch.Tensor,
) -> None:
    """Copy keys and values from slot to slot in every layer; reads come before writes, so moves may overlap."""
    for kv_cache in kv_caches:
        num_blocks, heads, block_size, width = kv_cache.shape
        pages = kv_cache.view(num_blocks, heads, 2, -1)
        keys = pages[:, :, 0].view(num_blocks, heads, width // 2, block_size)
        values = pages[:, :, 1].view(num_blocks, heads, block_size, width // 2)
        from_block, from_offset = source // block_size, source % block_size
        to_block, to_offset = target // block_size, target % block_size
        keys[to_block, :, :, to_offset] = keys[from_block, :, :, from_offset]
        values[to_block, :, to_offset] = values[from_block, :, from_offset]

"""Low-rank deltas in panels, as the CPU kernel reads them, and what they add, in torch operations."""

from __future__ import annotations

import torch
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from bita_kernels.linear_cpu_naive import pack_linear, smallest_dtype, unpack_linear


def pack_mask_lora(
    # [parts * rank, in] fp32
    lora_a: torch.Tensor,
    # [out, rank] fp32
    lora_b: torch.Tensor,
    # [parts, 2] int32
    parts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as `add_mask_lora_cpu` takes them: bfloat16 where that is exact, else fp32.

    Returns:
        `[panels, in, PANEL]` and `[panels, rank, PANEL]`. Every part of B begins a panel.
    """
    dtype = smallest_dtype(lora_b)
    b = [pack_linear(lora_b[first:end], dtype) for first, end in parts.tolist()]
    return pack_linear(lora_a, smallest_dtype(lora_a)), torch.cat(b)


def add_mask_lora_cpu_naive(
    # [rows, out], changed in place
    output: torch.Tensor,
    # [rows, in]
    x: torch.Tensor,
    # [panels, in, PANEL], of pack_mask_lora
    packed_a: torch.Tensor,
    # [panels, rank, PANEL]
    packed_b: torch.Tensor,
    # [parts, 2] int32, first column of each part in the output, and the one after its last
    parts: torch.Tensor,
    # [capacity] int64, rows of the step that are mask rows, in front
    mask_rows: torch.Tensor,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor,
) -> None:
    """The specification of `add_mask_lora_cpu`: `add_mask_lora_naive` with deltas in panels."""
    rank = packed_b.shape[1]
    lora_b = output.new_zeros(output.shape[1], rank)
    sizes = [end - first for first, end in parts.tolist()]
    panels = packed_b.split([-(-size // packed_b.shape[2]) for size in sizes])
    for (first, end), of_part in zip(parts.tolist(), panels, strict=True):
        lora_b[first:end] = unpack_linear(of_part, end - first)
    lora_a = unpack_linear(packed_a, len(sizes) * rank).to(x.dtype)
    add_mask_lora_naive(output, x, lora_a, lora_b, parts, mask_rows, num_mask_rows)

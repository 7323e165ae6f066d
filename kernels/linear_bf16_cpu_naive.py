"""A linear layer in bfloat16 with its low-rank deltas, in torch operations, and how the CPU kernel reads both."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 16  # output features


def pack_linear_bf16(
    # [out, in], in even
    weight: torch.Tensor,
) -> torch.Tensor:
    """`[panels, in / 2, PANEL, 2]` bfloat16; what is beyond the last output is zero."""
    missing = -len(weight) % PANEL
    panels = F.pad(weight.to(torch.bfloat16), (0, 0, 0, missing)).unflatten(0, (-1, PANEL))
    return panels.unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


def unpack_linear_bf16(
    # [panels, in / 2, PANEL, 2], of pack_linear_bf16
    packed: torch.Tensor,
    out_features: int,
) -> torch.Tensor:
    """`[out, in]` bfloat16."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features]


def pack_deltas_bf16(
    # [parts * rank, in], in even
    lora_a: torch.Tensor,
    # [out, rank]
    lora_b: torch.Tensor,
    # [parts, 2] int32, first column of each part in the output, and the one after its last
    parts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """A, B and `[panels]` int32, the part of each panel of outputs, -1 for none; None if a panel has two parts.

    An odd rank gets a column of zeros.
    """
    num_parts, rank = len(parts), lora_b.shape[1]
    part_of_panel = torch.full((-(-len(lora_b) // PANEL),), -1, dtype=torch.int32)
    for part, (first, end) in enumerate(parts.tolist()):
        if first % PANEL or (end % PANEL and end != len(lora_b)):
            return None
        part_of_panel[first // PANEL : -(-end // PANEL)] = part
    odd = rank % 2
    lora_a = F.pad(lora_a.unflatten(0, (num_parts, rank)), (0, 0, 0, odd)).flatten(0, 1)
    return pack_linear_bf16(lora_a), pack_linear_bf16(F.pad(lora_b, (0, odd))), part_of_panel


def linear_bf16_cpu_naive(
    # [..., in] bfloat16
    x: torch.Tensor,
    # [panels, in / 2, PANEL, 2], of pack_linear_bf16
    packed: torch.Tensor,
    # [out]
    bias: torch.Tensor | None,
    out_features: int,
    # of pack_deltas_bf16, all three or none
    packed_a: torch.Tensor | None = None,
    packed_b: torch.Tensor | None = None,
    part_of_panel: torch.Tensor | None = None,
    # [capacity] int64, rows of x that are mask rows, in front
    mask_rows: torch.Tensor | None = None,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, and on mask rows `+ (x @ A.T) @ B.T` of each part; `[..., out]` bfloat16.

    The specification of `linear_bf16_cpu`: the same arguments. Sums are in fp32; `x @ A.T` is rounded.
    """
    rows = x.flatten(0, -2).float()
    weight = unpack_linear_bf16(packed, out_features).float()
    out = F.linear(rows, weight, None if bias is None else bias.float())
    if packed_a is not None and packed_b is not None and part_of_panel is not None:
        assert mask_rows is not None and num_mask_rows is not None
        masks = mask_rows[: int(num_mask_rows)]
        rank = 2 * packed_b.shape[1]
        lora_b = unpack_linear_bf16(packed_b, out_features).float()
        num_low = rank * (int(part_of_panel.max()) + 1)
        low = rows[masks] @ unpack_linear_bf16(packed_a, num_low).float().T
        part_of_column = part_of_panel.repeat_interleave(PANEL)[:out_features]
        for part, of_part in enumerate(low.bfloat16().float().split(rank, dim=1)):
            added = (of_part @ lora_b.T).masked_fill(part_of_column != part, 0.0)
            out[masks] += added
    return out.to(x.dtype).view(*x.shape[:-1], out_features)

"""A linear layer's weights in panels, as the CPU kernel reads them, and the layer in torch operations.

Weights of a checkpoint in bfloat16 stay in bfloat16 where the model computes in fp32: the products are the same, and
half the bytes are read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 16  # output features
PAIR = 2  # panels


def pack_linear(
    # [out, in] fp32
    weight: torch.Tensor,
) -> torch.Tensor:
    """`[panels, in, PANEL]`: bfloat16 if that is every weight's exact value, else fp32.

    There is an even number of panels; what is beyond the last output is zero. In bfloat16, outputs j and j + 8 of a
    panel lie beside each other, in one word.
    """
    half = weight.to(torch.bfloat16)
    kept = half if torch.equal(half.to(weight.dtype), weight) else weight
    missing = -len(kept) % (PAIR * PANEL)
    panels = F.pad(kept, (0, 0, 0, missing)).unflatten(0, (-1, PANEL)).transpose(1, 2)
    if kept is half:
        panels = panels.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    return panels.contiguous()


def linear_cpu_naive(
    # [..., in] fp32
    x: torch.Tensor,
    # [panels, in, PANEL], of pack_linear
    packed: torch.Tensor,
    # [out] fp32
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`x @ weight.T + bias`, `[..., out]` fp32.

    The specification of `linear_cpu`: the same arguments.
    """
    if packed.dtype == torch.bfloat16:
        packed = packed.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    weight = packed.transpose(1, 2).flatten(0, 1)[:out_features]
    return F.linear(x, weight.to(x.dtype), bias)

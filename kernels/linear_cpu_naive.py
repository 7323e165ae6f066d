"""A linear layer's weights in panels, as the CPU kernel reads them, and the layer in torch operations.

Weights of a checkpoint in bfloat16 stay in bfloat16 where the model computes in fp32: the products are the same, and
half the bytes are read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 16  # output features


def smallest_dtype(
    weight: torch.Tensor,
) -> torch.dtype:
    """bfloat16 if that is every weight's exact value, else fp32."""
    exact = torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)
    return torch.bfloat16 if exact else torch.float32


def pack_linear(
    # [out, in]
    weight: torch.Tensor,
    # bfloat16 or fp32
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[panels, in, PANEL]`; what is beyond the last output is zero.

    In bfloat16, outputs j and j + 8 of a panel lie next to each other, in one word.
    """
    missing = -len(weight) % PANEL
    panels = F.pad(weight.to(dtype), (0, 0, 0, missing)).unflatten(0, (-1, PANEL)).transpose(1, 2)
    if dtype == torch.bfloat16:
        panels = panels.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    return panels.contiguous()


def unpack_linear(
    # [panels, in, PANEL], of pack_linear
    packed: torch.Tensor,
    out_features: int,
) -> torch.Tensor:
    """`[out, in]`, in the dtype of `packed`."""
    if packed.dtype == torch.bfloat16:
        packed = packed.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return packed.transpose(1, 2).flatten(0, 1)[:out_features]


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
    return F.linear(x, unpack_linear(packed, out_features).to(x.dtype), bias)

"""Linear layers of the CPU runner: weights packed for steps of few rows.

vLLM gives every unquantised linear layer and output head on a CPU a `cpu_linear`, oneDNN's product. On a CPU without
AVX-512 it takes twice the time that memory needs for one row, and twice as long for 16; ours: docs/kernels.md.
Source: dispatch_cpu_unquantized_gemm (vllm/model_executor/layers/utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as stock
from bita_kernels.linear_cpu_naive import pack_linear, smallest_dtype
from torch import nn

from bita_vllm.machine import is_plain_avx2
from bita_vllm.runner.loading import replaced


@contextmanager
def packed_linear_layers() -> Iterator[None]:
    """Layers whose weights are processed inside are packed, where that is faster."""
    dispatch = stock.dispatch_cpu_unquantized_gemm

    def pack_or_dispatch(layer: Any, remove_weight: bool) -> None:
        if is_faster_packed(layer.weight):
            pack(layer, remove_weight)
        else:
            dispatch(layer, remove_weight)

    with replaced(stock, "dispatch_cpu_unquantized_gemm", pack_or_dispatch):
        yield


def cpu_gains() -> bool:
    """CPUs with AVX2 and no more: where it was measured."""
    return is_plain_avx2()


def is_faster_packed(weight: torch.Tensor) -> bool:
    """fp32 layers, on CPUs that gain."""
    return weight.ndim == 2 and weight.dtype == torch.float32 and not weight.is_meta and cpu_gains()


def pack(layer: Any, remove_weight: bool) -> None:
    """`layer.cpu_linear` multiplies packed weights; with `remove_weight` they replace `layer.weight`, as in vLLM."""
    out_features, weight = len(layer.weight), layer.weight.detach()
    packed = pack_linear(weight, smallest_dtype(weight))
    layer.register_buffer("packed_weight", packed, persistent=False)
    if remove_weight:
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def linear(
        # [..., in]
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.bita.linear_cpu(x, layer.packed_weight, bias, out_features)

    layer.cpu_linear = linear

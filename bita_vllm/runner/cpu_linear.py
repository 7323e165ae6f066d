"""Linear layers of the CPU runner: weights packed for steps of few rows.

vLLM gives every unquantised linear layer and output head on a CPU a `cpu_linear`, oneDNN's product. On a CPU without
AVX-512 it takes twice the time that memory needs for one row, and twice as long for 16; ours: docs/kernels.md.
Source: dispatch_cpu_unquantized_gemm (vllm/model_executor/layers/utils.py).

On a CPU with AVX512-BF16, layers in bfloat16 keep oneDNN's product in plain steps, which are plain vLLM's; steps with
blocks, whose model is a form of its own (cpu_block_form.py), multiply weights packed for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import vllm.model_executor.layers.utils as stock
from bita_kernels.cpu_kernels import has_bf16_products
from bita_kernels.linear_bf16_cpu_naive import pack_deltas_bf16, pack_linear_bf16
from bita_kernels.linear_cpu_naive import pack_linear, smallest_dtype, unpack_linear
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from bita_vllm.runner.delta_layers import MaskLoraMethod
from bita_vllm.runner.loading import replaced
from bita_vllm.system.machine import is_plain_avx2

logger = init_logger("vllm.bita")


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


def blocks_gain() -> bool:
    """CPUs with AVX512-BF16 and without AMX, whose tiles oneDNN takes: where it was measured."""
    return has_bf16_products() and not torch.cpu._is_amx_tile_supported()


@contextmanager
def layers_packed_for_blocks() -> Iterator[None]:
    """Layers in bfloat16 whose weights are processed inside keep them packed for steps with blocks, too."""
    dispatch = stock.dispatch_cpu_unquantized_gemm

    def pack_and_dispatch(layer: Any, remove_weight: bool) -> None:
        # Of embeddings only output heads multiply, and those keep their weights: `multiply_packed`.
        if can_pack_for_blocks(layer.weight) and not isinstance(layer, VocabParallelEmbedding):
            pack_for_blocks(layer)
        dispatch(layer, remove_weight)

    with replaced(stock, "dispatch_cpu_unquantized_gemm", pack_and_dispatch):
        yield


def can_pack_for_blocks(weight: Any) -> bool:
    """Layers in bfloat16 with an even number of inputs, which the product takes two by two."""
    is_layer = weight.ndim == 2 and not weight.is_meta
    return is_layer and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


def pack_for_blocks(layer: Any) -> None:
    """Keep the layer's weights packed next to itself."""
    packed = pack_linear_bf16(layer.weight.detach())
    layer.register_buffer("block_weight", packed, persistent=False)
    layer.block_out_features, layer.block_deltas = len(layer.weight), ()


def renew_block_form(
    # the two forms of a model, after new weights came into the first
    model: nn.Module,
    block_model: nn.Module,
) -> None:
    """Give the form for steps with blocks what reloading made anew in the other one."""
    twins = dict(block_model.named_modules())
    for name, layer in model.named_modules():
        if (twin := twins[name]) is layer:
            continue
        twin._parameters.update(layer._parameters)
        twin._buffers.update(layer._buffers)
        if "cpu_linear" in layer.__dict__:
            twin.cpu_linear = layer.cpu_linear
        if isinstance(twin, ParallelLMHead) and hasattr(twin, "block_weight"):
            twin.block_weight.copy_(pack_linear_bf16(layer.weight.detach()))


class BlockLinearMethod(LinearMethodBase):
    """A layer's product with its packed weights, and its delta for mask rows in the same pass."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the layer's weights are loaded")

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As LinearMethodBase.apply: x `[..., in]`."""
        out_features: Any = layer.block_out_features
        deltas: Any = layer.block_deltas
        return torch.ops.bita.linear_bf16_cpu(x, layer.block_weight, bias, out_features, *deltas)


def packing(packs: bool, packs_for_blocks: bool) -> AbstractContextManager[None]:
    """Inside, layers whose weights are processed are packed as an engine wants them."""
    if packs:
        return packed_linear_layers()
    return layers_packed_for_blocks() if packs_for_blocks else nullcontext()


def multiply_packed(
    # the form for steps with blocks, its deltas in it
    model: nn.Module,
) -> None:
    """Its linear layers that have packed weights multiply with those, and its output head."""
    for layer in model.modules():
        is_stock_head = isinstance(layer, ParallelLMHead) and isinstance(
            layer.quant_method, UnquantizedEmbeddingMethod
        )
        if is_stock_head and can_pack_for_blocks(layer.weight):
            pack_for_blocks(layer)
            layer.quant_method = BlockLinearMethod()
        if not isinstance(layer, LinearBase) or not hasattr(layer, "block_weight"):
            continue
        lora = layer.quant_method
        if isinstance(lora, MaskLoraMethod):
            deltas = packed_deltas(layer)
            if deltas is None:
                lora.stock = BlockLinearMethod()
                continue
            layer.block_deltas = (*deltas, layer.mask_rows, layer.num_mask_rows)
            del layer.mask_lora_a, layer.mask_lora_b
        layer.quant_method = BlockLinearMethod()
    packed = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("block_weight"))
    logger.info("bita: %.0f MiB of weights packed for steps with blocks.", packed / 2**20)


def packed_deltas(
    # with the deltas of put_in_mask_lora
    layer: Any,
) -> tuple[torch.Tensor, ...] | None:
    """A, B and the part of each panel, as `linear_bf16_cpu` takes them; None if it cannot."""
    parts, rank = layer.mask_lora_parts, layer.mask_lora_b.shape[1]
    if layer.mask_lora_a.shape[1] % 2:
        return None
    lora_b = torch.zeros(layer.block_out_features, rank)
    sizes = [end - first for first, end in parts.tolist()]
    panels = layer.mask_lora_b.split([-(-size // layer.mask_lora_b.shape[2]) for size in sizes])
    for (first, end), of_part in zip(parts.tolist(), panels, strict=True):
        lora_b[first:end] = unpack_linear(of_part, end - first)
    return pack_deltas_bf16(unpack_linear(layer.mask_lora_a, len(parts) * rank), lora_b, parts)

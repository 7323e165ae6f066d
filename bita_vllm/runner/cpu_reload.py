"""New weights in a running CPU engine: what was made of the old weights is made of the new ones.

vLLM reloads layer by layer, in place. Afterwards it puts a layer's own tensors back and copies into them what it has
loaded, but into no buffer that a layer made for itself, such as packed weights. An output head that is tied to the
input embedding loads nothing, so its product stays that of the old weights; in plain vLLM, too.
Source: vllm/model_executor/model_loader/reload/layerwise.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as stock
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from bita_vllm.runner.loading import replaced


@contextmanager
def renewed_products(model: nn.Module) -> Iterator[None]:
    """Renew packed weights and tied output heads when weights are reloaded inside.

    Packed weights stay where they are, so that compiled graphs and other holders see the new ones, unless the new
    ones take another type.
    """
    before = {layer: dict(layer._buffers) for layer in model.modules()}
    moved: list[tuple[nn.Module, str, torch.Tensor]] = []
    dispatch = stock.dispatch_cpu_unquantized_gemm

    def dispatch_and_renew(layer: Any, remove_weight: bool) -> None:
        held = dict(layer._buffers)
        dispatch(layer, remove_weight)
        for name, made in list(layer._buffers.items()):
            old = before[layer].get(name)
            if made is held.get(name) or made is None or old is None:
                continue
            if (made.shape, made.dtype) == (old.shape, old.dtype):
                layer._buffers[name] = old.copy_(made)
            else:
                moved.append((layer, name, made))

    with replaced(stock, "dispatch_cpu_unquantized_gemm", dispatch_and_renew):
        yield
        for head in tied_heads(model):
            head.quant_method.process_weights_after_loading(head)
    for layer, name, made in moved:
        layer._buffers[name] = made


def tied_heads(model: nn.Module) -> list[ParallelLMHead]:
    """Output heads that have an input embedding's weights."""
    heads, embeddings = [], set()
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            heads.append(module)
        elif isinstance(module, VocabParallelEmbedding):
            embeddings.add(id(module.weight))
    return [head for head in heads if id(getattr(head, "weight", None)) in embeddings]

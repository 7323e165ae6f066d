"""What of a base model is refused once its layers are known, and before its weights are read.

What its config says is refused in `refusals.py`, before any process starts.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.runner.delta_layers import find_places
from bita_vllm.runner.embedding import token_embedding


def check_model(
    model: nn.Module,
    vllm_config: VllmConfig,
    # None where copies alone draft
    adapter: Adapter | None,
    impl_cls: Any,
) -> dict[str, Any]:
    """Return every layer with a KV cache by its name, where bita can serve them all with this adapter.

    Args:
        impl_cls: tree attention's class, which says its `head_sizes` and `quantised_caches`.

    Raises:
        ValueError: one sentence on what is not supported, or does not fit.
    """
    if adapter is not None:
        token_embedding(model)
    # Every layer with state between steps, of which only attention with a KV cache is known to bear blocks.
    layers: dict[str, Any] = dict(get_layers_from_vllm_config(vllm_config, AttentionLayerBase))
    for name, layer in layers.items():
        _refuse_layer(name, layer, impl_cls)
    if adapter is not None and adapter.mask_lora is not None:
        find_places(model, adapter.mask_lora)
    return layers


def _refuse_layer(name: str, layer: Any, impl_cls: Any) -> None:
    feature = _unsupported_layer(layer, impl_cls)
    if feature is not None:
        raise ValueError(
            f"bita does not support {feature} (layer {name}); serve this model without it."
        )


def _unsupported_layer(layer: Any, impl_cls: Any) -> str | None:
    impl = getattr(layer, "impl", None)
    if impl is None:
        return f"layers of type {type(layer).__name__}"
    if not isinstance(impl, impl_cls):
        return f"attention of type {type(impl).__name__}"
    if impl.attn_type != AttentionType.DECODER:
        return f"attention of kind {impl.attn_type}"
    if impl.head_size not in impl_cls.head_sizes:
        return f"attention heads of size {impl.head_size}"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if getattr(impl, "chunk_lookback", -1) > -1:
        return "attention in chunks"
    cache = layer.kv_cache_dtype
    if is_quantized_kv_cache(cache) and cache not in impl_cls.quantised_caches:
        return f"a KV cache of type {cache}"
    if impl.kv_sharing_target_layer_name is not None:
        return "KV caches shared between layers"
    return None

"""What every runner does while the base model is loaded: our attention goes in, then the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from bita_vllm.adapter import Adapter, ModelShape
from bita_vllm.config import BitaSettings
from bita_vllm.runner.embedding import insert_mask_embedding

logger = init_logger("vllm.bita")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside: for what vLLM builds in a closed place."""
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextmanager
def attention_backend(place: AttentionBackendEnum, backend: type) -> Iterator[None]:
    """Models built inside get `backend` where vLLM would take the one of that `place`."""
    register_backend(place, f"{backend.__module__}.{backend.__qualname__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        place.clear_override()
        _cached_get_attn_backend.cache_clear()


def put_in_adapter(
    model: nn.Module,
    vllm_config: VllmConfig,
    settings: BitaSettings,
    impl_cls: type,
    # that tree attention reads prompt tokens in
    prompt_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Mask embeddings into the model, prompt tokens into every layer; one line in the log.

    Args:
        impl_cls: tree attention, whose layers have `set_prompt_tokens` and say `takes_sinks`.

    Raises:
        ValueError: the adapter does not fit, or a layer's attention is not supported.
    """
    model_config = vllm_config.model_config
    adapter = Adapter.load(
        settings.adapter_dir, ModelShape.from_hf_config(model_config.hf_text_config)
    )
    vocab_size = model_config.get_vocab_size()
    insert_mask_embedding(model, adapter.mask_embeddings.to(device), vocab_size)
    added = adapter.mask_embeddings.nbytes
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
        _refuse_layer(name, layer, impl_cls)
        index = extract_layer_index(name)
        added += layer.impl.set_prompt_tokens(
            adapter.prompt_keys[index].to(device, prompt_dtype),
            adapter.prompt_values[index].to(device, prompt_dtype),
        )
    logger.info(
        "bita: adapter %s, step block of %s, %.1f MiB added.",
        settings.adapter_dir,
        settings.ladder.describe(),
        added / 2**20,
    )


def _refuse_layer(name: str, layer: Attention, impl_cls: Any) -> None:
    impl = layer.impl
    feature = None
    if not isinstance(impl, impl_cls):
        feature = f"attention of type {type(impl).__name__}"
    elif impl.attn_type != AttentionType.DECODER:
        feature = f"attention of kind {impl.attn_type}"
    elif impl.alibi_slopes is not None:
        feature = "ALiBi"
    elif impl.sinks is not None and not impl_cls.takes_sinks:
        feature = "attention sinks"
    elif impl.kv_sharing_target_layer_name is not None:
        feature = "KV caches shared between layers"
    if feature is not None:
        raise ValueError(
            f"bita does not support {feature} (layer {name}); serve this model without it."
        )

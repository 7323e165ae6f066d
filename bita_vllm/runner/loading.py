"""Loading, for both runners: our attention backend goes into the base model, then the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.runner.delta_layers import AddMaskLora, PackMaskLora, put_in_mask_lora
from bita_vllm.runner.embedding import insert_mask_embedding
from bita_vllm.runner.model_checks import check_model
from bita_vllm.step.mask_rows import MaskRows
from bita_vllm.step.settings import BitaSettings

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


@contextmanager
def before_weights(check: Callable[[nn.Module], object]) -> Iterator[None]:
    """Models that are loaded inside go through `check` when they have their layers, but not their weights.

    Source: BaseModelLoader.load_model (vllm/model_executor/model_loader/base_loader.py).
    """
    create = BaseModelLoader.create_model

    def create_and_check(self: BaseModelLoader, *args: Any, **kwargs: Any) -> nn.Module:
        model = create(self, *args, **kwargs)
        check(model)
        return model

    with replaced(BaseModelLoader, "create_model", create_and_check):
        yield


@contextmanager
def tree_attention_models(
    place: AttentionBackendEnum, backend: Any, vllm_config: VllmConfig, settings: BitaSettings
) -> Iterator[Adapter | None]:
    """Models loaded inside have tree attention; what of them bita cannot serve is refused before weights are read.

    Yields:
        The run's adapter, if it has one.

    Raises:
        ValueError: the adapter is damaged or another model's, or the model is not supported.
    """
    adapter = None
    if settings.adapter_dir is not None:
        shape = ModelShape.from_hf_config(vllm_config.model_config.hf_text_config)
        adapter = Adapter.load(settings.adapter_dir, shape)
    impl_cls = backend.get_impl_cls()
    checked = before_weights(lambda model: check_model(model, vllm_config, adapter, impl_cls))
    with attention_backend(place, backend), checked:
        yield adapter


def put_in_adapter(
    model: nn.Module,
    adapter: Adapter,
    vllm_config: VllmConfig,
    settings: BitaSettings,
    impl_cls: type,
    # that tree attention reads prompt tokens in
    prompt_dtype: torch.dtype,
    add_mask_lora: AddMaskLora,
    pack_mask_lora: PackMaskLora,
    device: torch.device,
    # what add_mask_lora reads of a step
    mask_rows_type: type[MaskRows] = MaskRows,
) -> MaskRows | None:
    """Put the adapter into a model: mask embeddings, and prompt tokens and deltas in every layer. Logs one line.

    Args:
        impl_cls: tree attention's class, whose layers have `set_prompt_tokens`.

    Returns:
        The object that must be told which rows of each step are mask rows; None if the adapter has no deltas.

    Raises:
        ValueError: from `check_model`, where a loader has built the model in a way of its own.
    """
    layers = check_model(model, vllm_config, adapter, impl_cls)
    vocab_size = vllm_config.model_config.get_vocab_size()
    insert_mask_embedding(model, adapter.mask_embeddings.to(device), vocab_size)
    added = adapter.mask_embeddings.nbytes
    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, layer in layers.items():
        index = extract_layer_index(name)
        added += layer.impl.set_prompt_tokens(
            *(
                own_kv_heads(tokens[index], rank, num_ranks).to(device, prompt_dtype)
                for tokens in (adapter.prompt_keys, adapter.prompt_values)
            )
        )
    mask_rows, deltas = None, ""
    if adapter.mask_lora is not None:
        # One more place than a step has rows.
        mask_rows = mask_rows_type(vllm_config.scheduler_config.max_num_batched_tokens + 1, device)
        delta_bytes = put_in_mask_lora(
            model, adapter.mask_lora, mask_rows, add_mask_lora, pack_mask_lora, device
        )
        added += delta_bytes
        deltas = f", deltas of rank {adapter.mask_lora.rank} ({delta_bytes / 2**20:.1f} MiB)"
    if rank == 0:
        logger.info(
            "bita: adapter %s, step block of %s%s, %.1f MiB added%s.",
            settings.adapter_dir,
            settings.ladder.describe(),
            deltas,
            added / 2**20,
            f" to each of {num_ranks} ranks" if num_ranks > 1 else "",
        )
    return mask_rows


def put_in_no_adapter(
    model: nn.Module,
    vllm_config: VllmConfig,
    settings: BitaSettings,
    impl_cls: type,
    # that tree attention computes in
    prompt_dtype: torch.dtype,
) -> None:
    """Make a model ready for blocks of copies alone: its layers have no prompt tokens. Logs one line.

    Raises:
        ValueError: from `check_model`, where a loader has built the model in a way of its own.
    """
    for layer in check_model(model, vllm_config, None, impl_cls).values():
        none = torch.empty(0, layer.impl.num_kv_heads, layer.impl.head_size, dtype=prompt_dtype)
        layer.impl.set_prompt_tokens(none, none)
    if get_tensor_model_parallel_rank() == 0:
        logger.info(
            "bita: no adapter: drafts are copies of text already seen, step block of %s.",
            settings.ladder.describe(),
        )


def own_kv_heads(
    # [P, Hkv, D]
    tokens: torch.Tensor,
    rank: int,
    num_ranks: int,
) -> torch.Tensor:
    """`[P, own Hkv, D]`, the KV heads of a tensor-parallel rank, as vLLM's QKVParallelLinear deals them out.

    With fewer heads than ranks each head is on several ranks.
    """
    num_heads = tokens.shape[1]
    if num_heads < num_ranks:
        head = rank // (num_ranks // num_heads)
        return tokens[:, head : head + 1]
    own = num_heads // num_ranks
    return tokens[:, rank * own : (rank + 1) * own]


def keep_through_sleep(model: nn.Module, *owners: Any) -> None:
    """Make the tensors that `owners` hold buffers of the model.

    vLLM's sleep mode throws away what was made while the model was loaded, at level 2, but for the model's
    buffers: those it saves, and fills in place on waking up (gpu_worker.py).
    """
    held = (value for owner in owners for value in vars(owner).values())
    module = nn.Module()
    for index, value in enumerate(held):
        if torch.is_tensor(value) and not isinstance(value, nn.Parameter):
            module.register_buffer(f"tensor_{index}", value, persistent=False)
    model.add_module("bita_tensors", module)

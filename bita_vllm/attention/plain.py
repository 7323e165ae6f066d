"""Rows of no block in FlashAttention where vLLM has it for a layer, as plain vLLM does: prefill and plain decoding.

It reads and writes the KV cache as the Triton backend lays it out: both take `[num_blocks, Hkv, block_size, 2 * D]`
in any strides, blocks of a multiple of 16 slots, a step's keys and values written before attention
(vllm/v1/attention/backends/{triton_attn,flash_attn}.py, the same in 0.32 and 0.33). Metadata is FlashAttention's own
(`gpu_metadata.py`), with its scheduler metadata and splits, in FULL graphs and outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from bita_vllm.hooks import PLAIN_HOOKS
from bita_vllm.hooks.check import check_installed

if TYPE_CHECKING:  # it does not import everywhere
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

logger = init_logger("vllm.bita")

# FlashAttention 4 compiles its kernels when they are first called: seconds within a request.
VERSIONS = (2, 3)


def flash_attention(
    impl: TritonAttentionImpl, dtype: torch.dtype, block_size: int
) -> FlashAttentionImpl | None:
    """vLLM's FlashAttention for the rows of no block in a layer; None where it does not fit, or might not.

    Args:
        impl: the layer's own attention; its weights (sinks) are loaded.
        dtype: the model's.
        block_size: slots of a KV cache block.
    """
    reason = next(_reasons_against(impl, dtype, block_size), None)
    if reason is None:
        flash = _flash_attention(impl)
        version = flash.vllm_flash_attn_version
        if version in VERSIONS:
            logger.info_once("bita: prefill and plain decoding in FlashAttention %s.", version)
            return flash
        reason = f"its version here is {version}"
    logger.info_once(
        "bita: prefill and plain decoding in Triton attention, not in FlashAttention: %s.", reason
    )
    return None


def _flash_attention(impl: TritonAttentionImpl) -> FlashAttentionImpl:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    window = impl.sliding_window[0]
    return FlashAttentionImpl(
        impl.num_heads,
        impl.head_size,
        impl.scale,
        impl.num_kv_heads,
        alibi_slopes=None,
        sliding_window=None if window < 0 else window + 1,
        kv_cache_dtype=impl.kv_cache_dtype,
        logits_soft_cap=impl.logits_soft_cap,
        attn_type=impl.attn_type,
        sinks=impl.sinks,
    )


def _reasons_against(
    impl: TritonAttentionImpl, dtype: torch.dtype, block_size: int
) -> Iterator[str]:
    """What this layer has that FlashAttention lacks here, or that nobody has compared with tree attention."""
    capability = current_platform.get_device_capability()
    if capability is None:
        yield "no CUDA device"
        return
    if envs.VLLM_BATCH_INVARIANT:
        yield "VLLM_BATCH_INVARIANT"
    if impl.kv_cache_dtype != "auto":
        yield f"kv_cache_dtype {impl.kv_cache_dtype}"
    if impl.alibi_slopes is not None:
        yield "ALiBi"
    if impl.sinks is not None and impl.sinks.dtype != torch.bfloat16:
        yield f"attention sinks in {impl.sinks.dtype}"
    try:
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    except (ImportError, OSError) as error:
        yield str(error)
        return
    yield from map(str, check_installed(PLAIN_HOOKS))
    yield from FlashAttentionBackend.validate_configuration(
        head_size=impl.head_size,
        dtype=dtype,
        kv_cache_dtype="auto",
        block_size=block_size,
        use_mla=False,
        has_sink=impl.sinks is not None,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=capability,
        attn_type=impl.attn_type,
        has_sliding_window=impl.sliding_window[0] >= 0,
    )

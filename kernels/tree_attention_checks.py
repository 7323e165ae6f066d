"""What `tree_attention` refuses: shapes, dtypes, strides, devices and numbers that do not fit."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from .attention_config import AttentionConfig
from .checks import QUANTISED_TYPES, TRITON_TYPES, check_tensor
from .tree_table import TreeTable

HEAD_SIZES = range(16, 257, 16)


@dataclass(frozen=True)
class Arguments:
    """What `tree_attention` was called with, under its own names (a workspace and the longest sequence go apart)."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    line: torch.Tensor
    table: TreeTable
    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    out: torch.Tensor
    scale: float
    config: AttentionConfig
    max_query_len: int
    window: int
    softcap: float
    sinks: torch.Tensor | None
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def check_arguments(given: Arguments) -> None:
    """Raise ValueError for the first of the arguments that does not fit the others."""
    query, key_cache, line, out, table = (
        given.query, given.key_cache, given.line, given.out, given.table
    )  # fmt: skip
    device, num_requests = query.device, line.shape[0] if line.dim() else 0
    query_types = [*TRITON_TYPES, *QUANTISED_TYPES]
    check_tensor("query", query, [None, None, None], query_types, device, contiguous=False)
    out_types = list(TRITON_TYPES) if query.dtype in QUANTISED_TYPES else [query.dtype]
    check_tensor("out", out, query.shape, out_types, device, contiguous=False)
    num_rows, num_q_heads, head_size = query.shape
    check_tensor(
        "table.ancestor_bits", table.ancestor_bits, [None, None, None], [torch.int32], device
    )
    if head_size not in HEAD_SIZES:
        raise ValueError(f"query has head size {head_size}, expected a multiple of 16 up to 256.")
    cache_types = [out.dtype, *QUANTISED_TYPES]
    cache_shape = [None, None, None, head_size]
    check_tensor("key_cache", key_cache, cache_shape, cache_types, device, contiguous=False)
    check_tensor(
        "value_cache",
        given.value_cache,
        key_cache.shape,
        [key_cache.dtype],
        device,
        contiguous=False,
    )
    num_kv_heads = key_cache.shape[2]
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_q_heads} heads, expected a multiple of key_cache's {num_kv_heads}."
        )
    integers = [torch.int32]
    check_tensor(
        "block_table", given.block_table, [num_requests, None], integers, device, contiguous=False
    )
    check_tensor("query_start", given.query_start, [num_requests + 1], integers, device)
    check_tensor("seq_lens", given.seq_lens, [num_requests], integers, device)
    check_tensor("line", line, [num_requests], integers, device)
    check_tensor("table.depth", table.depth, [None, None], integers, device)
    prompt_shape = [None, num_kv_heads, head_size]
    check_tensor("prompt_keys", given.prompt_keys, prompt_shape, [out.dtype], device)
    check_tensor("prompt_values", given.prompt_values, given.prompt_keys.shape, [out.dtype], device)
    if given.sinks is not None:
        check_tensor("sinks", given.sinks, [num_q_heads], list(TRITON_TYPES), device)
    for name, scale, scaled in (
        ("q_scale", given.q_scale, query),
        ("k_scale", given.k_scale, key_cache),
        ("v_scale", given.v_scale, given.value_cache),
    ):
        quantised = scaled.dtype in QUANTISED_TYPES
        if quantised != (scale is not None):
            expected = "one fp32 number" if quantised else "None"
            raise ValueError(
                f"{name} is {'None' if scale is None else 'given'}, expected {expected} where "
                f"what it scales is {scaled.dtype}."
            )
        if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
            raise ValueError(
                f"{name} has {scale.numel()} numbers of {scale.dtype}, expected one of torch.float32."
            )
    for name, number, least, most in (
        ("max_query_len", given.max_query_len, 1, max(num_rows, 1)),
        ("window", given.window, 0, math.inf),
        ("softcap", given.softcap, 0, math.inf),
        ("scale", given.scale, sys.float_info.min, math.inf),
    ):
        if not least <= number <= most:
            raise ValueError(f"{name} is {number}, expected {least} to {most}.")
    if given.max_query_len > table.num_rows:
        raise ValueError(
            f"max_query_len is {given.max_query_len}, expected at most the table's {table.num_rows} rows: "
            "prefill is for other kernels."
        )
    split, block_n = given.config.split, given.config.block_n
    if split % block_n:
        raise ValueError(
            f"config has splits of {split} slots, expected a multiple of its tile's {block_n}."
        )

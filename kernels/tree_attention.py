"""Attention of step blocks over a paged KV cache: context, own rows by ancestry, prompt tokens, one softmax.

Replaces the causal mask of plain decoding where a request's rows are a tree (DESIGN sections 2 and 7).
A request's KV lies in linear slots 0 to seq_len - 1 behind its block table; its own rows are the last
ones and have been written before. Every row sees the committed context in front of them. Among its own
rows it sees itself and its ancestors (a block), or itself and the rows before it (line -1: prefill
chunk, plain decoding). Mask rows also see the prompt tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from .attention_config import ANY_LENGTH, AttentionConfig
from .checks import TRITON_TYPES, check_device, check_tensor
from .tree_attention_kernel import combine_splits_kernel, tree_attention_kernel
from .tree_attention_models import COMBINE_HEADS, QUANTISED_TYPES, shipped
from .tree_table import TreeTable

HEAD_SIZES = range(16, 257, 16)
__all__ = ["Workspace", "shipped", "tree_attention"]


@dataclass(frozen=True)
class Workspace:
    """Partial results of splits that run side by side; without one a program goes through all splits.

    The result is the same; with few requests it comes sooner.

    Attributes:
        acc: `[splits, B * R, Hq, D]` fp32. stats: `[2, splits, B * R, Hq]` fp32, peaks and sums.
    """

    acc: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def empty(
        cls,
        config: AttentionConfig,
        num_requests: int,
        num_rows: int,
        num_q_heads: int,
        head_size: int,
        max_seq_len: int,
        device: torch.device | str,
    ) -> Workspace:
        """For up to `num_requests` blocks of `num_rows` rows; `nbytes` says what it takes."""
        rows = (config.num_splits(max_seq_len), num_requests * num_rows, num_q_heads)
        acc = torch.empty(*rows, head_size, dtype=torch.float32, device=device)
        return cls(acc, torch.empty(2, *rows, dtype=torch.float32, device=device))

    def holds(self, config: AttentionConfig, num_rows: int, max_seq_len: int) -> bool:
        """Whether it is big enough for `num_rows`, B * R, and sequences of up to `max_seq_len`."""
        return config.num_splits(max_seq_len) * num_rows <= self.acc.shape[0] * self.acc.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.acc.nbytes + self.stats.nbytes


def tree_attention(
    # [rows, Hq, D] out's dtype, or fp8; the last dimension packed
    query: torch.Tensor,
    # [num_blocks, block_size, Hkv, D], any strides but the last; out's dtype, or fp8
    key_cache: torch.Tensor,
    # [num_blocks, block_size, Hkv, D]
    value_cache: torch.Tensor,
    # [B, max blocks] int32
    block_table: torch.Tensor,
    # [B + 1] int32, where each request's rows begin
    query_start: torch.Tensor,
    # [B] int32, committed context and own rows
    seq_lens: torch.Tensor,
    # [B] int32, line of the table; -1: causal
    line: torch.Tensor,
    table: TreeTable,
    # [P, Hkv, D], out's dtype, contiguous
    prompt_keys: torch.Tensor,
    # [P, Hkv, D]
    prompt_values: torch.Tensor,
    # Output. [rows, Hq, D] fp32, fp16 or bf16
    out: torch.Tensor,
    *,
    scale: float,
    config: AttentionConfig,
    max_query_len: int,
    max_seq_len: int,
    window: int = 0,
    softcap: float = 0.0,
    # [Hq] any float type, logits of attention sinks
    sinks: torch.Tensor | None = None,
    # one fp32 number each, what an fp8 query, key or value is multiplied with
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Write the attention of every request's rows to `out`; rows of no request are not touched.

    Args:
        scale: factor of the logits.
        config: tiles, from `AttentionConfig.choose`.
        max_query_len: upper bound of a request's rows; the grid follows from it.
        max_seq_len: upper bound of `seq_lens`, at most the one that `workspace` was made for.
        window: sliding window in positions (tree depths, not slots), the row's own included; 0 for none.
            Prompt tokens are always inside.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.

    Raises:
        ValueError: shapes, dtypes, strides, devices or numbers that do not fit; before any launch.
    """
    check_device(tree_attention_kernel, query.device)
    _check(**locals())
    num_requests, (num_blocks, block_size, num_kv_heads, head_size) = len(line), key_cache.shape
    num_q_heads, num_prompt = query.shape[1], len(prompt_keys)
    if num_requests == 0 or num_blocks == 0:
        return
    group = num_q_heads // num_kv_heads
    num_splits = config.num_splits(max_seq_len)
    partial_rows = num_requests * table.num_rows
    partials: tuple[torch.Tensor | None, ...] = (None, None)
    stats_size = 0
    if workspace is not None and num_splits > 1:
        partials, stats_size = (workspace.acc, workspace.stats), workspace.stats[0].numel()

    def launch(parallel: bool, longest: int, min_queries: int, max_queries: int) -> None:
        tiles = triton.cdiv(longest * group, config.block_m)
        tree_attention_kernel[(tiles * num_kv_heads, num_requests, num_splits if parallel else 1)](
            query,
            key_cache,
            value_cache,
            out,
            block_table,
            query_start,
            seq_lens,
            line,
            table.ancestor_bits,
            table.depth,
            table.mask_index,
            prompt_keys,
            prompt_values,
            q_scale,
            k_scale,
            v_scale,
            sinks,
            *(partials if parallel else (None, None)),
            scale,
            softcap,
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
            partial_rows,
            stats_size,
            **config.constants(
                num_kv_heads=num_kv_heads,
                group=group,
                num_rows=table.num_rows,
                num_prompt=num_prompt,
                head_size=head_size,
                block_size=block_size,
                window=window,
                parallel=parallel,
                min_queries=min_queries,
                max_queries=max_queries,
            ),
            SOFTCAP=softcap > 0,
            SINKS=sinks is not None,
            QUANTISED_QUERY=query.dtype in QUANTISED_TYPES,
            QUANTISED=key_cache.dtype in QUANTISED_TYPES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    if not stats_size:
        launch(False, max_query_len, 1, ANY_LENGTH)
        return
    # Requests with more rows than the template are prefill chunks: they fill the machine without splits.
    short = min(max_query_len, table.num_rows)
    launch(True, short, 1, table.num_rows)
    if max_query_len > table.num_rows:
        launch(False, max_query_len, table.num_rows + 1, ANY_LENGTH)
    combine_splits_kernel[(short, num_requests, triton.cdiv(num_q_heads, COMBINE_HEADS))](
        out,
        query_start,
        seq_lens,
        *partials,
        out.stride(0),
        out.stride(1),
        partial_rows,
        stats_size,
        NUM_HEADS=num_q_heads,
        BLOCK_HEADS=COMBINE_HEADS,
        NUM_ROWS=table.num_rows,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        SPLIT=config.split,
        num_warps=4,
    )


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    line: torch.Tensor,
    table: TreeTable,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    config: AttentionConfig,
    max_query_len: int,
    max_seq_len: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    workspace: Workspace | None,
) -> None:
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
        "value_cache", value_cache, key_cache.shape, [key_cache.dtype], device, contiguous=False
    )
    num_kv_heads = key_cache.shape[2]
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_q_heads} heads, expected a multiple of key_cache's {num_kv_heads}."
        )
    integers = [torch.int32]
    check_tensor(
        "block_table", block_table, [num_requests, None], integers, device, contiguous=False
    )
    check_tensor("query_start", query_start, [num_requests + 1], integers, device)
    check_tensor("seq_lens", seq_lens, [num_requests], integers, device)
    check_tensor("line", line, [num_requests], integers, device)
    check_tensor("table.depth", table.depth, [None, None], integers, device)
    prompt_shape = [None, num_kv_heads, head_size]
    check_tensor("prompt_keys", prompt_keys, prompt_shape, [out.dtype], device)
    check_tensor("prompt_values", prompt_values, prompt_keys.shape, [out.dtype], device)
    if sinks is not None:
        check_tensor("sinks", sinks, [num_q_heads], list(TRITON_TYPES), device)
    for name, given, scaled in (
        ("q_scale", q_scale, query),
        ("k_scale", k_scale, key_cache),
        ("v_scale", v_scale, value_cache),
    ):
        quantised = scaled.dtype in QUANTISED_TYPES
        if quantised != (given is not None):
            expected = "one fp32 number" if quantised else "None"
            raise ValueError(
                f"{name} is {'None' if given is None else 'given'}, expected {expected} where "
                f"what it scales is {scaled.dtype}."
            )
        if given is not None and (given.numel() != 1 or given.dtype != torch.float32):
            raise ValueError(
                f"{name} has {given.numel()} numbers of {given.dtype}, expected one of torch.float32."
            )
    capacity = block_table.shape[1] * key_cache.shape[1]
    for name, number, least, most in (
        ("max_query_len", max_query_len, 1, max(num_rows, 1)),
        ("max_seq_len", max_seq_len, 1, max(capacity, 1)),
        ("window", window, 0, math.inf),
        ("softcap", softcap, 0, math.inf),
        ("scale", scale, -math.inf, math.inf),
    ):
        if not least <= number <= most:
            raise ValueError(f"{name} is {number}, expected {least} to {most}.")
    if config.split % config.block_n:
        raise ValueError(
            f"config has splits of {config.split} slots, expected a multiple of its tile's {config.block_n}."
        )
    if workspace is not None:
        rows = num_requests * table.num_rows
        shape = (config.num_splits(max_seq_len), rows, num_q_heads, head_size)
        needed = math.prod(shape)
        if workspace.acc.numel() < needed or workspace.stats.numel() < 2 * needed // head_size:
            raise ValueError(
                f"workspace holds {workspace.acc.numel()} numbers, expected at least {needed} for "
                f"[splits, rows, heads, head size] = {list(shape)}."
            )
        check_tensor("workspace.acc", workspace.acc.view(-1), [None], [torch.float32], device)
        check_tensor("workspace.stats", workspace.stats.view(-1), [None], [torch.float32], device)

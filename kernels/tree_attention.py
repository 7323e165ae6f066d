"""Attention of step blocks over a paged KV cache: context, own rows by ancestry, prompt tokens, one softmax.

Replaces the causal mask of plain decoding where a request's rows are a tree.
A request's KV lies in linear slots 0 to seq_len - 1, which its block table maps to pages; its own rows are the last
ones and have been written before. Every row sees the committed context in front of them. Among its own
rows it sees itself and its ancestors (a block), or itself and the rows before it (line -1: padding, a
request without a block). Mask rows also see the prompt tokens. Prefill is for other kernels: a request
has at most R rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .attention_config import COMBINE_HEADS, EARLY_SM, AttentionConfig
from .checks import QUANTISED_TYPES, check_device
from .tree_attention_checks import Arguments, check_arguments
from .tree_attention_kernel import combine_splits_kernel, tree_attention_kernel
from .tree_attention_models import shipped
from .tree_table import TreeTable

# Programs of a launch for each streaming multiprocessor, where its requests have as many splits.
PROGRAMS_PER_PROCESSOR = 2
# Where a launch's tiles are so many for each program that fills the machine, one program takes all parts of a tile of a
# short context: it starts once, and leaves no partial results. Longer contexts would keep the others waiting.
IN_TURN_SHARE = 0.2
SHORT_CONTEXT = 4096
# Checked layouts of arguments that are remembered: one for each number of requests and rows.
MAX_PLANS = 4096
__all__ = ["Workspace", "shipped", "tree_attention"]


@dataclass(frozen=True)
class Workspace:
    """Partial results of a sequence's parts, which then run side by side; without one they run in turn.

    The result is the same; with few requests it comes sooner.

    Attributes:
        acc: `[parts, B * R, Hq, D]` fp32. stats: `[2, parts, B * R, Hq]` fp32, peaks and sums.
        programs: how many fill the machine: a launch has about as many, if there are as many splits.
        short: contexts of fewer slots go in turn, one program for each tile, where a launch has tiles enough.
    """

    acc: torch.Tensor
    stats: torch.Tensor
    programs: int
    short: int = 0

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
        rows = (config.num_parts(max_seq_len), num_requests * num_rows, num_q_heads)
        acc = torch.empty(*rows, head_size, dtype=torch.float32, device=device)
        stats = torch.empty(2, *rows, dtype=torch.float32, device=device)
        programs = PROGRAMS_PER_PROCESSOR * num_processors(acc.device)
        return cls(acc, stats, programs, SHORT_CONTEXT)

    def holds(self, config: AttentionConfig, num_rows: int, max_seq_len: int) -> bool:
        """Whether it is big enough for `num_rows`, B * R, and sequences of up to `max_seq_len`."""
        return config.num_parts(max_seq_len) * num_rows <= self.acc.shape[0] * self.acc.shape[1]

    def check(
        self,
        config: AttentionConfig,
        num_rows: int,
        max_seq_len: int,
        # [rows, Hq, D]
        query: torch.Tensor,
    ) -> None:
        """Raise ValueError where it is too small for `num_rows`, B * R, or is not of the query's shape."""
        shape = (config.num_parts(max_seq_len), num_rows, *query.shape[1:])
        if self.acc.numel() < math.prod(shape) or self.stats.numel() < 2 * math.prod(shape[:3]):
            raise ValueError(
                f"workspace holds {self.acc.numel()} numbers, expected at least {math.prod(shape)} for "
                f"[parts, rows, heads, head size] = {list(shape)}."
            )

    def in_turn_slots(self, tiles: int) -> int:
        """Return the slots below which a context goes in turn, in a launch of so many tiles."""
        return self.short if tiles >= IN_TURN_SHARE * self.programs else 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.acc.nbytes + self.stats.nbytes


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def starts_early(device: torch.device) -> bool:
    """Whether the merge of a launch may begin while its attention runs."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= EARLY_SM


@dataclass(frozen=True)
class _Plan:
    """What a launch needs besides tensors; it follows from the layouts of the arguments alone.

    Attributes:
        strides: of query, out, key_cache, value_cache and block_table, as the kernel takes them.
        out_strides: of rows and heads.
        in_turn, side_by_side: compile-time constants of `tree_attention_kernel`.
        combine: those of `combine_splits_kernel`.
        tiles: of a request, for all its KV heads.
        combine_tiles: of a row, for all its heads.
        capacity: slots of the longest sequence that the block table can hold.
    """

    strides: tuple[int, ...]
    out_strides: tuple[int, int]
    in_turn: dict[str, Any]
    side_by_side: dict[str, Any]
    combine: dict[str, Any]
    tiles: int
    combine_tiles: int
    capacity: int

    @classmethod
    def of(cls, given: Arguments) -> _Plan:
        """For arguments that have been checked."""
        query, keys, out, config, table = (
            given.query, given.key_cache, given.out, given.config, given.table
        )  # fmt: skip
        block_size, num_kv_heads, head_size = keys.shape[1:]
        num_q_heads = query.shape[1]
        group = num_q_heads // num_kv_heads
        constants = {
            **config.constants(
                num_kv_heads=num_kv_heads,
                group=group,
                num_rows=table.num_rows,
                num_prompt=len(given.prompt_keys),
                head_size=head_size,
                block_size=block_size,
                window=given.window,
            ),
            "SOFTCAP": given.softcap > 0,
            "SINKS": given.sinks is not None,
            "QUANTISED_QUERY": query.dtype in QUANTISED_TYPES,
            "QUANTISED": keys.dtype in QUANTISED_TYPES,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        early = starts_early(query.device)
        combine = config.combine_constants(
            num_q_heads=num_q_heads,
            num_rows=table.num_rows,
            head_size=head_size,
            window=given.window,
        )
        return cls(
            strides=(
                *query.stride()[:2],
                *out.stride()[:2],
                *keys.stride()[:3],
                *given.value_cache.stride()[:3],
                given.block_table.stride(0),
            ),
            out_strides=(out.stride(0), out.stride(1)),
            in_turn={**constants, "PARALLEL": False, "EARLY_COMBINE": False},
            side_by_side={**constants, "PARALLEL": True, "EARLY_COMBINE": early},
            combine={**combine, "launch_pdl": early, "num_warps": 4},
            tiles=triton.cdiv(given.max_query_len * group, config.block_m) * num_kv_heads,
            combine_tiles=triton.cdiv(num_q_heads, COMBINE_HEADS),
            capacity=max(given.block_table.shape[1] * block_size, 1),
        )


_plans: dict[Hashable, _Plan] = {}


def _layout(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


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
        max_query_len: upper bound of a request's rows, at most R of the table; the grid follows from it.
        max_seq_len: upper bound of `seq_lens`, at most the one that `workspace` was made for.
        window: sliding window in positions (tree depths, not slots), the row's own included; 0 for none.
            Prompt tokens are always inside.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.

    Raises:
        ValueError: shapes, dtypes, strides, devices or numbers that do not fit; before any launch.
    """
    layouts = (
        *map(_layout, (query, key_cache, value_cache, block_table, query_start, seq_lens, line)),
        *map(_layout, (table.ancestor_bits, table.depth, prompt_keys, prompt_values, out)),
        *map(_layout, (sinks, q_scale, k_scale, v_scale)),
    )
    key = (layouts, scale, config, max_query_len, window, softcap)
    plan = _plans.get(key)
    if plan is None:
        check_device(tree_attention_kernel, query.device)
        given = Arguments(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            block_table=block_table,
            query_start=query_start,
            seq_lens=seq_lens,
            line=line,
            table=table,
            prompt_keys=prompt_keys,
            prompt_values=prompt_values,
            out=out,
            scale=scale,
            config=config,
            max_query_len=max_query_len,
            window=window,
            softcap=softcap,
            sinks=sinks,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        check_arguments(given)
        plan = _Plan.of(given)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    if not 1 <= max_seq_len <= plan.capacity:
        raise ValueError(f"max_seq_len is {max_seq_len}, expected 1 to {plan.capacity}.")
    num_requests = len(line)
    if num_requests == 0 or len(key_cache) == 0:
        return
    partial_rows, num_programs = num_requests * table.num_rows, 1
    partials: tuple[torch.Tensor | None, ...] = (None, None)
    stats_size = in_turn_slots = 0
    if workspace is not None:
        workspace.check(config, partial_rows, max_seq_len, query)
        partials, stats_size = (workspace.acc, workspace.stats), workspace.stats[0].numel()
        num_programs = config.num_programs(
            plan.tiles * num_requests, workspace.programs, max_seq_len
        )
        if config.short_in_turn(query.shape[2]):
            in_turn_slots = workspace.in_turn_slots(plan.tiles * num_requests)
    # By position: by name a call would take 6 us more on the host, of 40.
    tree_attention_kernel[(plan.tiles, num_requests, num_programs)](
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
        *partials,
        scale,
        softcap,
        *plan.strides,
        partial_rows,
        stats_size,
        in_turn_slots,
        **(plan.in_turn if workspace is None else plan.side_by_side),
    )
    if workspace is not None:
        combine_splits_kernel[(max_query_len, num_requests, plan.combine_tiles)](
            out,
            query_start,
            seq_lens,
            *partials,
            *plan.out_strides,
            partial_rows,
            stats_size,
            in_turn_slots,
            **plan.combine,
        )

"""The Triton kernels of `tree_attention` (tree_attention.py has the launcher and says what they compute).

A request's keys come in parts, each with a softmax of its own that starts empty: the own part (sink,
prompt tokens, own rows), then the splits of the committed context (attention_config.py says where they
begin). The parts are merged in this order: in one program (`PARALLEL` off, or a short context), or by
`combine_splits_kernel` from partial results. Both do the same operations in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_attention_parts import (
    NEG_INF,
    attend,
    empty,
    load_pages,
    merge,
    own_part,
    split_bounds,
    splits_seen,
)

# Partial results that `combine_splits_kernel` has under way.
COMBINE_STAGES = tl.constexpr(4)


@triton.jit
def _store_partial(
    acc_ptr,
    stats_ptr,
    # of one of the two halves
    stats_size,
    # [BLOCK_M] int64, where each row of the part lies
    at,
    dims,
    peak,
    total,
    acc,
    # [BLOCK_M] bool
    row_exists,
    HEAD_SIZE: tl.constexpr,
):
    """A part's softmax into the workspace."""
    tl.store(stats_ptr + at, peak, mask=row_exists)
    tl.store(stats_ptr + stats_size + at, total, mask=row_exists)
    mask = row_exists[:, None] & (dims < HEAD_SIZE)[None, :]
    tl.store(acc_ptr + at[:, None] * HEAD_SIZE + dims[None, :], acc, mask=mask)


@triton.jit
def _attend_context(
    # of the tile
    first,
    # of its slots that exist
    end,
    peak,
    total,
    acc,
    q,
    # as load_pages takes it
    cache,
    context_len,
    depth,
    dims,
    page_scale,
    softcap,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the committed context into a running softmax."""
    slots = first + tl.arange(0, BLOCK_N)
    exists = slots < end
    k, v = load_pages(cache, slots, exists, dims, HEAD_SIZE, BLOCK_SIZE, QUANTISED, q.dtype)
    visible = exists[None, :]
    if WINDOW > 0:
        visible &= (context_len + depth)[:, None] - slots[None, :] < WINDOW
    return attend(q, k, v, visible, peak, total, acc, page_scale, softcap, SOFTCAP)


# These follow from the number of requests: not worth a compilation of their own.
@triton.jit(do_not_specialize=["num_partial_rows", "in_turn_slots"])
def tree_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_table_ptr,
    query_start_ptr,
    seq_len_ptr,
    line_ptr,
    ancestor_bits_ptr,
    depth_ptr,
    mask_index_ptr,
    prompt_keys_ptr,
    prompt_values_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    # [parts, B * R, Hq, D] and [2, parts, B * R, Hq] fp32
    partial_acc_ptr,
    partial_stats_ptr,
    scale,
    softcap,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    k_page_stride,
    k_slot_stride,
    k_head_stride,
    v_page_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    num_partial_rows,
    # of one of partial_stats' two halves
    stats_size,
    # a context of fewer slots: one program takes its parts in turn, and its result is no partial one
    in_turn_slots,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_PROMPT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTISED_QUERY: tl.constexpr,
    QUANTISED: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_DOUBLING: tl.constexpr,
    SHORT_IN_TURN: tl.constexpr,
    EARLY_COMBINE: tl.constexpr,
):
    """One tile of packed rows of one request and KV head: some of its parts (`PARALLEL`), or all of them in turn.

    With `PARALLEL`, too, the first program of a tile takes all parts of a short context in turn.
    With `EARLY_COMBINE` the merge starts when all programs have started, and waits for their end.
    """
    if EARLY_COMBINE:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    request = tl.program_id(1)
    # One branch for all of them: the compiler would load what comes after a first one later.
    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    seq_len = tl.load(seq_len_ptr + request)
    line = tl.load(line_ptr + request)
    num_queries = end - start
    context_len = seq_len - num_queries
    first_slot, first_split, last_split = splits_seen(
        context_len, WINDOW, BLOCK_N, SPLIT, PER_DOUBLING
    )
    in_turn = tl.maximum(context_len, 0) < in_turn_slots
    has_work = tile * BLOCK_M < num_queries * GROUP
    if PARALLEL:
        num_parts = 1 + tl.maximum(last_split - first_split, 0)
        has_work &= tl.program_id(2) < tl.where(in_turn, 1, num_parts)
    if not has_work:
        return

    has_tree = line >= 0
    first_place = tl.maximum(line, 0) * NUM_ROWS
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, q_head = packed // GROUP, kv_head * GROUP + packed % GROUP
    row_exists = row < num_queries
    in_tree = row < tl.where(has_tree, num_queries, 0)
    depth = tl.load(depth_ptr + first_place + row, mask=in_tree, other=0)
    depth = tl.where(in_tree, depth, row)
    sees_prompt = tl.load(mask_index_ptr + first_place + row, mask=in_tree, other=-1) >= 0
    dims = tl.arange(0, BLOCK_D)
    tile_mask = row_exists[:, None] & (dims < HEAD_SIZE)[None, :]
    q_rows = q_ptr + (start + row).to(tl.int64) * q_row_stride + q_head * q_head_stride
    q = tl.load(q_rows[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    if QUANTISED_QUERY:
        q = q.to(out_ptr.dtype.element_ty)  # exact
        scale *= tl.load(q_scale_ptr)
    page_scale, v_scale = scale, 1.0
    if QUANTISED:
        page_scale, v_scale = scale * tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    cache = (
        k_ptr + kv_head * k_head_stride,
        v_ptr + kv_head * v_head_stride,
        block_table_ptr + request * table_stride,
        (k_page_stride, k_slot_stride),
        (v_page_stride, v_slot_stride),
        v_scale,
    )
    # What every tile of the context is attended with.
    seen = (q, cache, context_len, depth, dims, page_scale, softcap)
    # of part 0
    partial_row = (request * NUM_ROWS + row).to(tl.int64) * (NUM_KV_HEADS * GROUP) + q_head
    part_size = num_partial_rows.to(tl.int64) * (NUM_KV_HEADS * GROUP)

    if PARALLEL:  # noqa: SIM102
        if tl.program_id(2) > 0:
            # The longest splits are a sequence's last ones, and start first.
            for index in range(
                tl.program_id(2) - 1, last_split - first_split, tl.num_programs(2) - 1
            ):
                split = last_split - 1 - index
                begin, end = split_bounds(split, SPLIT, PER_DOUBLING)
                end = tl.minimum(end, context_len)
                peak, total, acc = empty(BLOCK_M, BLOCK_D)
                for first in range(tl.maximum(begin, first_slot), end, BLOCK_N):
                    peak, total, acc = _attend_context(
                        first, end, peak, total, acc, *seen,
                        HEAD_SIZE, BLOCK_SIZE, WINDOW, SOFTCAP, QUANTISED, BLOCK_N,
                    )  # fmt: skip
                _store_partial(
                    partial_acc_ptr,
                    partial_stats_ptr,
                    stats_size,
                    partial_row + (split + 1).to(tl.int64) * part_size,
                    dims,
                    peak,
                    total,
                    acc,
                    row_exists,
                    HEAD_SIZE,
                )
            return

    merged_peak, merged_total, merged_acc = own_part(
        q,
        prompt_keys_ptr,
        prompt_values_ptr,
        sinks_ptr,
        ancestor_bits_ptr + first_place * NUM_WORDS,
        depth_ptr + first_place,
        cache,
        context_len,
        num_queries,
        has_tree,
        kv_head,
        q_head,
        row,
        depth,
        sees_prompt,
        dims,
        scale,
        page_scale,
        softcap,
        NUM_KV_HEADS,
        NUM_WORDS,
        NUM_PROMPT,
        HEAD_SIZE,
        BLOCK_SIZE,
        WINDOW,
        SOFTCAP,
        SINKS,
        QUANTISED,
        BLOCK_M,
        BLOCK_D,
        BLOCK_N,
    )
    if PARALLEL:  # noqa: SIM102
        if not in_turn:
            _store_partial(
                partial_acc_ptr,
                partial_stats_ptr,
                stats_size,
                partial_row,
                dims,
                merged_peak,
                merged_total,
                merged_acc,
                row_exists,
                HEAD_SIZE,
            )
            return

    if (not PARALLEL) or SHORT_IN_TURN:
        peak, total, acc = empty(BLOCK_M, BLOCK_D)
        split = first_split
        _, boundary = split_bounds(split, SPLIT, PER_DOUBLING)
        for first in range(first_slot, context_len, BLOCK_N):
            # A split ends here: without a branch, so that loads keep running ahead.
            ends = first == boundary
            merged_peak, merged_total, merged_acc = merge(
                merged_peak, merged_total, merged_acc, tl.where(ends, peak, NEG_INF), total, acc
            )
            # Forgets total and acc, too: the next tile multiplies them by zero.
            peak = tl.where(ends, NEG_INF, peak)
            split += ends.to(tl.int32)
            _, boundary = split_bounds(split, SPLIT, PER_DOUBLING)
            peak, total, acc = _attend_context(
                first, context_len, peak, total, acc, *seen,
                HEAD_SIZE, BLOCK_SIZE, WINDOW, SOFTCAP, QUANTISED, BLOCK_N,
            )  # fmt: skip
        if first_split < last_split:
            merged_peak, merged_total, merged_acc = merge(
                merged_peak, merged_total, merged_acc, peak, total, acc
            )
        # A padding row of a block sees the context only; without any, nothing.
        result = tl.where(merged_total[:, None] > 0, merged_acc / merged_total[:, None], 0.0)
        out_rows = out_ptr + (start + row).to(tl.int64) * out_row_stride
        out_tile = (out_rows + q_head * out_head_stride)[:, None] + dims[None, :]
        tl.store(out_tile, result.to(out_ptr.dtype.element_ty), mask=tile_mask)


# As many as there are requests: not worth a compilation of their own.
@triton.jit(do_not_specialize=["num_partial_rows", "in_turn_slots"])
def combine_splits_kernel(
    out_ptr,
    query_start_ptr,
    seq_len_ptr,
    partial_acc_ptr,
    partial_stats_ptr,
    out_row_stride,
    out_head_stride,
    num_partial_rows,
    # of one of partial_stats' two halves
    stats_size,
    # a context of fewer slots: one program takes its parts in turn, and its result is no partial one
    in_turn_slots,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_DOUBLING: tl.constexpr,
    # Triton's own option, too: the launch may begin before the one in front of it has ended.
    launch_pdl: tl.constexpr,
):
    """Partial results of one row, a few query heads, merged in the order of parts."""
    row, request = tl.program_id(0), tl.program_id(1)
    # Written before the launch in front, which began when all before it had ended.
    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    seq_len = tl.load(seq_len_ptr + request)
    if launch_pdl:
        # Every program waits, those without work too: what comes next waits for this launch alone.
        tl.extra.cuda.gdc_wait()
    num_queries = end - start
    if row >= num_queries:
        return
    context_len = seq_len - num_queries
    if tl.maximum(context_len, 0) < in_turn_slots:
        return
    _, first_split, last_split = splits_seen(context_len, WINDOW, BLOCK_N, SPLIT, PER_DOUBLING)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_D)
    exists = head < NUM_HEADS
    tile_mask = exists[:, None] & (dims < HEAD_SIZE)[None, :]
    first = (request * NUM_ROWS + row).to(tl.int64) * NUM_HEADS + head
    stats, accs = partial_stats_ptr + first, partial_acc_ptr + first[:, None] * HEAD_SIZE
    accs += dims[None, :]
    part_size = num_partial_rows.to(tl.int64) * NUM_HEADS
    peak = tl.load(stats, mask=exists, other=NEG_INF)
    total = tl.load(stats + stats_size, mask=exists, other=0.0)
    acc = tl.load(accs, mask=tile_mask, other=0.0)
    for split in tl.range(first_split, last_split, num_stages=COMBINE_STAGES):
        at = (split + 1) * part_size
        part_peak = tl.load(stats + at, mask=exists, other=NEG_INF)
        part_total = tl.load(stats + stats_size + at, mask=exists, other=0.0)
        part_acc = tl.load(accs + at * HEAD_SIZE, mask=tile_mask, other=0.0)
        peak, total, acc = merge(peak, total, acc, part_peak, part_total, part_acc)
    result = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    out_rows = out_ptr + (start + row).to(tl.int64) * out_row_stride + head * out_head_stride
    tl.store(out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=tile_mask)

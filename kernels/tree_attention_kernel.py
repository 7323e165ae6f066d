"""The Triton kernels of `tree_attention` (tree_attention.py has the launcher and says what they compute).

Scores are kept in base 2. A split starts from an empty softmax and is merged into the running one in
the order of positions: in one program (`PARALLEL` off), or by `combine_splits_kernel` from partial
results. Both do the same operations in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _attend(
    # [BLOCK_M, BLOCK_D]
    q,
    # [BLOCK_D, n]
    k,
    # [n, BLOCK_D]
    v,
    # [BLOCK_M, n] bool
    visible,
    # [BLOCK_M] running maximum, [BLOCK_M] running sum, [BLOCK_M, BLOCK_D]
    peak,
    total,
    acc,
    scale,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile of keys into a running softmax."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        # tanh(x) = 2 * sigmoid(2x) - 1
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores / softcap * (-2.0 * LOG2E))) - 1.0)
    scores *= LOG2E
    if MASKED:
        scores = tl.where(visible, scores, NEG_INF)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # Rows that have seen nothing yet: -inf - -inf is NaN.
    base = tl.where(new_peak == NEG_INF, 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def _merge(peak, total, acc, split_peak, split_total, split_acc):
    """One split's softmax into the running one."""
    new_peak = tl.maximum(peak, split_peak)
    base = tl.where(new_peak == NEG_INF, 0.0, new_peak)
    fade, split_fade = tl.exp2(peak - base), tl.exp2(split_peak - base)
    # Spelt out, so that both kernels round alike whatever the compiler would contract.
    total = tl.fma(total, fade, split_total * split_fade)
    acc = tl.fma(acc, fade[:, None], split_acc * split_fade[:, None])
    return new_peak, total, acc


@triton.jit
def _pages(
    k_ptr,
    v_ptr,
    table_row_ptr,
    # [BLOCK_N] slots of the sequence
    slots,
    # [BLOCK_N] bool
    exists,
    dims,
    k_strides,
    v_strides,
    v_scale,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Keys `[BLOCK_D, BLOCK_N]` and values `[BLOCK_N, BLOCK_D]` of the slots, in `dtype`.

    fp8 keys are cast, which is exact: their scale is a factor of the scores.
    """
    page = tl.load(table_row_ptr + slots // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    offset = slots % BLOCK_SIZE
    k_rows = k_ptr + page * k_strides[0] + offset * k_strides[1]
    v_rows = v_ptr + page * v_strides[0] + offset * v_strides[1]
    inside = dims < HEAD_SIZE
    k = tl.load(k_rows[None, :] + dims[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
    v = tl.load(v_rows[:, None] + dims[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
    if QUANTISED:
        k = k.to(dtype)
        v = (v.to(tl.float32) * v_scale).to(dtype)
    return k, v


@triton.jit
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
    # [splits, B * R, Hq, D] and [2, splits, B * R, Hq] fp32
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_PROMPT: tl.constexpr,
    BLOCK_PROMPT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTISED_QUERY: tl.constexpr,
    QUANTISED: tl.constexpr,
    PARALLEL: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of packed rows of one request and KV head: one split (`PARALLEL`), or all of them in turn.

    Requests with fewer rows than MIN_QUERIES or more than MAX_QUERIES are left to another launch.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    request = tl.program_id(1)
    start = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - start
    out_of_range = (num_queries < MIN_QUERIES) | (num_queries > MAX_QUERIES)
    if out_of_range | (tile * BLOCK_M >= num_queries * GROUP):
        return
    seq_len = tl.load(seq_len_ptr + request)
    num_splits = tl.cdiv(seq_len, SPLIT)
    first_split, last_split = tl.program_id(2), num_splits
    if PARALLEL:
        last_split = tl.minimum(first_split + 1, num_splits)
    if first_split >= num_splits:
        return
    context_len = seq_len - num_queries
    line = tl.load(line_ptr + request)
    # Rows whose place in a tree the table knows: none of a causal request.
    tree_rows = tl.where(line >= 0, NUM_ROWS, 0)
    line = tl.maximum(line, 0)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, q_head = packed // GROUP, kv_head * GROUP + packed % GROUP
    row_exists = row < num_queries
    in_tree = row_exists & (row < tree_rows)
    place = line * NUM_ROWS + row
    depth = tl.load(depth_ptr + place, mask=in_tree, other=0)
    depth = tl.where(in_tree, depth, row)
    sees_prompt = tl.load(mask_index_ptr + place, mask=in_tree, other=-1) >= 0
    # A causal tile sees nothing behind its last row.
    last_row = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    last_slot = tl.where(tree_rows > 0, seq_len, context_len + last_row + 1)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_SIZE
    q_rows = q_ptr + (start + row).to(tl.int64) * q_row_stride + q_head * q_head_stride
    tile_mask = row_exists[:, None] & inside[None, :]
    q = tl.load(q_rows[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    if QUANTISED_QUERY:
        q = q.to(out_ptr.dtype.element_ty)  # exact
        scale *= tl.load(q_scale_ptr)
    page_scale, v_scale = scale, 1.0
    if QUANTISED:
        page_scale, v_scale = scale * tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    table_row_ptr = block_table_ptr + request * table_stride

    peak = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(first_split, last_split):
        split_peak = tl.full([BLOCK_M], NEG_INF, tl.float32)
        split_total = tl.zeros([BLOCK_M], tl.float32)
        split_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if split == 0:
            if SINKS:
                split_peak = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2E
                split_total += 1.0
            if NUM_PROMPT > 0:  # noqa: SIM102 (a compile-time condition, then one that is not)
                if tree_rows > 0:
                    prompt = tl.arange(0, BLOCK_PROMPT)
                    at = (prompt * NUM_KV_HEADS + kv_head) * HEAD_SIZE
                    exists = prompt < NUM_PROMPT
                    k = tl.load(
                        prompt_keys_ptr + at[None, :] + dims[:, None],
                        mask=inside[:, None] & exists[None, :],
                        other=0.0,
                    )
                    v = tl.load(
                        prompt_values_ptr + at[:, None] + dims[None, :],
                        mask=exists[:, None] & inside[None, :],
                        other=0.0,
                    )
                    split_peak, split_total, split_acc = _attend(
                        q,
                        k,
                        v,
                        sees_prompt[:, None] & exists[None, :],
                        split_peak,
                        split_total,
                        split_acc,
                        scale,
                        softcap,
                        True,
                        SOFTCAP,
                    )
        begin = split * SPLIT
        end = tl.minimum(begin + SPLIT, last_slot)
        if WINDOW > 0:
            # Tiles in front of the earliest position that the earliest row sees.
            earliest = tl.maximum(context_len - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            begin = tl.maximum(begin, earliest)
        # Committed context, tiles that every row sees whole.
        whole_end = tl.maximum(tl.minimum(end, context_len // BLOCK_N * BLOCK_N), begin)
        for first in range(begin, whole_end, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            k, v = _pages(
                k_ptr,
                v_ptr,
                table_row_ptr,
                slots,
                slots < end,
                dims,
                (k_page_stride, k_slot_stride),
                (v_page_stride, v_slot_stride),
                v_scale,
                HEAD_SIZE,
                BLOCK_SIZE,
                QUANTISED,
                q.dtype,
            )
            visible = (context_len + depth)[:, None] - slots[None, :] < WINDOW
            split_peak, split_total, split_acc = _attend(
                q,
                k,
                v,
                visible,
                split_peak,
                split_total,
                split_acc,
                page_scale,
                softcap,
                WINDOW > 0,
                SOFTCAP,
            )
        # The end of the context, and the request's own rows.
        for first in range(whole_end, end, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            k, v = _pages(
                k_ptr,
                v_ptr,
                table_row_ptr,
                slots,
                slots < end,
                dims,
                (k_page_stride, k_slot_stride),
                (v_page_stride, v_slot_stride),
                v_scale,
                HEAD_SIZE,
                BLOCK_SIZE,
                QUANTISED,
                q.dtype,
            )
            own = slots - context_len
            is_own = (own >= 0) & (slots < end)
            word = ancestor_bits_ptr + place[:, None] * NUM_WORDS + (own >> 5)[None, :]
            in_block = in_tree[:, None] & (is_own & (own < tree_rows))[None, :]
            bits = tl.load(word, mask=in_block, other=0)
            seen = (bits >> (own & 31)[None, :]) & 1
            causal = (own[None, :] <= row[:, None]).to(tl.int32)
            seen = tl.where(in_tree[:, None], seen, causal)
            visible = (own < 0)[None, :] | (is_own[None, :] & (seen > 0))
            if WINDOW > 0:
                is_node = is_own & (own < tree_rows)
                own_depth = tl.load(depth_ptr + line * NUM_ROWS + own, mask=is_node, other=0)
                position = tl.where(is_node, own_depth, own)
                visible &= depth[:, None] - position[None, :] < WINDOW
            split_peak, split_total, split_acc = _attend(
                q,
                k,
                v,
                visible,
                split_peak,
                split_total,
                split_acc,
                page_scale,
                softcap,
                True,
                SOFTCAP,
            )
        if PARALLEL:
            at = (split * num_partial_rows + request * NUM_ROWS + row).to(tl.int64)
            at = at * (NUM_KV_HEADS * GROUP) + q_head
            tl.store(partial_stats_ptr + at, split_peak, mask=row_exists)
            tl.store(partial_stats_ptr + stats_size + at, split_total, mask=row_exists)
            partial = partial_acc_ptr + at[:, None] * HEAD_SIZE + dims[None, :]
            tl.store(partial, split_acc, mask=tile_mask)
        else:
            peak, total, acc = _merge(peak, total, acc, split_peak, split_total, split_acc)
    if not PARALLEL:
        # A padding row behind its line sees the context only; without any, nothing.
        result = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
        out_rows = out_ptr + (start + row).to(tl.int64) * out_row_stride + q_head * out_head_stride
        out_tile = out_rows[:, None] + dims[None, :]
        tl.store(out_tile, result.to(out_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit
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
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Partial results of one row, a few query heads, merged in the order of positions."""
    row, request = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - start
    if (row >= num_queries) | (num_queries > NUM_ROWS):
        return
    num_splits = tl.cdiv(tl.load(seq_len_ptr + request), SPLIT)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_D)
    exists = head < NUM_HEADS
    tile_mask = exists[:, None] & (dims < HEAD_SIZE)[None, :]
    peak = tl.full([BLOCK_HEADS], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    for split in range(0, num_splits):
        at = (split * num_partial_rows + request * NUM_ROWS + row).to(tl.int64) * NUM_HEADS + head
        split_peak = tl.load(partial_stats_ptr + at, mask=exists, other=NEG_INF)
        split_total = tl.load(partial_stats_ptr + stats_size + at, mask=exists, other=0.0)
        split_acc = tl.load(
            partial_acc_ptr + at[:, None] * HEAD_SIZE + dims[None, :], mask=tile_mask, other=0.0
        )
        peak, total, acc = _merge(peak, total, acc, split_peak, split_total, split_acc)
    result = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    out_rows = out_ptr + (start + row).to(tl.int64) * out_row_stride + head * out_head_stride
    tl.store(out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=tile_mask)

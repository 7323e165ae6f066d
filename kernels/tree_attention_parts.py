"""Pieces of the `tree_attention` kernels: the running softmax, where splits lie, a request's own part.

Scores are kept in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def attend(
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
    # positive: a product times this is a score
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
):
    """One tile of keys into a running softmax."""
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        # tanh(x) = 2 / (1 + exp(-2x)) - 1
        fall = tl.exp2(scores * (scale / softcap * (-2.0 * LOG2E)))
        scores = (softcap * LOG2E) * (2.0 / (1.0 + fall) - 1.0)
        scale = 1.0
    else:
        scale *= LOG2E
    scores = tl.where(visible, scores, NEG_INF)
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    # Rows that have seen nothing yet: -inf - -inf is NaN.
    base = tl.where(new_peak == NEG_INF, 0.0, new_peak)
    # Multiplications and additions are spelt out as one, so that all variants round alike.
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    fade = tl.exp2(peak - base)
    total = tl.fma(total, fade, tl.sum(weights, 1))
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def merge(peak, total, acc, part_peak, part_total, part_acc):
    """One part's softmax into the running one."""
    new_peak = tl.maximum(peak, part_peak)
    base = tl.where(new_peak == NEG_INF, 0.0, new_peak)
    fade, part_fade = tl.exp2(peak - base), tl.exp2(part_peak - base)
    total = tl.fma(total, fade, part_total * part_fade)
    acc = tl.fma(acc, fade[:, None], part_acc * part_fade[:, None])
    return new_peak, total, acc


@triton.jit
def empty(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A softmax over nothing."""
    peak = tl.full([BLOCK_M], NEG_INF, tl.float32)
    return peak, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def _split_count(num_slots, SPLIT: tl.constexpr, PER_DOUBLING: tl.constexpr):
    """Splits that hold the first `num_slots` slots; `AttentionConfig.num_splits` is its twin."""
    length, longer = SPLIT, 0
    while 2 * PER_DOUBLING * length < num_slots:
        length *= 2
        longer += PER_DOUBLING
    return longer + tl.cdiv(num_slots, length)


@triton.jit
def split_bounds(split, SPLIT: tl.constexpr, PER_DOUBLING: tl.constexpr):
    """The first slot of a split, and the next split's."""
    doublings = tl.maximum(split // PER_DOUBLING - 1, 0)
    length = SPLIT << doublings
    begin = (split - doublings * PER_DOUBLING) * length
    return begin, begin + length


@triton.jit
def splits_seen(
    context_len,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_DOUBLING: tl.constexpr,
):
    """The first slot that a row sees, at the start of a tile; its split, and the end of the splits."""
    first_slot, first_split = 0, 0
    if WINDOW > 0:
        first_slot = tl.maximum(context_len - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        first_split = tl.maximum(_split_count(first_slot + 1, SPLIT, PER_DOUBLING) - 1, 0)
    last_split = _split_count(tl.maximum(context_len, 0), SPLIT, PER_DOUBLING)
    return first_slot, first_split, last_split


@triton.jit
def load_pages(
    # keys, values, the request's row of the block table; strides of a page and of a slot, of each; scale of the values
    cache,
    # [n] slots of the sequence
    slots,
    # [n] bool
    exists,
    dims,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Keys `[BLOCK_D, n]` and values `[n, BLOCK_D]` of the slots, in `dtype`.

    fp8 keys are cast, which is exact: their scale is a factor of the scores.
    """
    k_ptr, v_ptr, table_row_ptr, k_strides, v_strides, v_scale = cache
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
def own_part(
    q,
    prompt_keys_ptr,
    prompt_values_ptr,
    sinks_ptr,
    # of the request's line
    ancestor_bits_ptr,
    depth_ptr,
    # as load_pages takes it
    cache,
    context_len,
    num_queries,
    has_tree,
    kv_head,
    # [BLOCK_M] each
    q_head,
    row,
    depth,
    sees_prompt,
    dims,
    scale,
    page_scale,
    softcap,
    NUM_KV_HEADS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_PROMPT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sink, prompt tokens and the request's own rows."""
    peak, total, acc = empty(BLOCK_M, BLOCK_D)
    if SINKS:
        peak = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2E
        total += 1.0
    if has_tree:
        for first in range(0, NUM_PROMPT, BLOCK_N):
            prompt = first + tl.arange(0, BLOCK_N)
            at = (prompt * NUM_KV_HEADS + kv_head) * HEAD_SIZE
            exists, inside = prompt < NUM_PROMPT, dims < HEAD_SIZE
            keys = prompt_keys_ptr + at[None, :] + dims[:, None]
            k = tl.load(keys, mask=inside[:, None] & exists[None, :], other=0.0)
            values = prompt_values_ptr + at[:, None] + dims[None, :]
            v = tl.load(values, mask=exists[:, None] & inside[None, :], other=0.0)
            visible = sees_prompt[:, None] & exists[None, :]
            peak, total, acc = attend(q, k, v, visible, peak, total, acc, scale, softcap, SOFTCAP)
    row_exists = row < num_queries
    for first in range(0, num_queries, BLOCK_N):
        own = first + tl.arange(0, BLOCK_N)
        # A graph is captured with sequences shorter than their rows.
        exists = (own < num_queries) & (context_len + own >= 0)
        k, v = load_pages(
            cache, context_len + own, exists, dims, HEAD_SIZE, BLOCK_SIZE, QUANTISED, q.dtype
        )
        seen = own[None, :] <= row[:, None]
        if has_tree:
            bits = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for i in tl.static_range((BLOCK_N + 31) // 32):
                word = first // 32 + i
                if word < NUM_WORDS:
                    row_word = ancestor_bits_ptr + row * NUM_WORDS + word
                    row_bits = tl.load(row_word, mask=row_exists, other=0)
                    bits = tl.where((own // 32 == word)[None, :], row_bits[:, None], bits)
            seen = ((bits >> (own % 32)[None, :]) & 1) > 0
        visible = seen & exists[None, :]
        if WINDOW > 0:
            # positions, relative to the context's end
            position = own
            if has_tree:
                position = tl.load(depth_ptr + own, mask=own < num_queries, other=0)
            visible &= depth[:, None] - position[None, :] < WINDOW
        peak, total, acc = attend(q, k, v, visible, peak, total, acc, page_scale, softcap, SOFTCAP)
    return peak, total, acc

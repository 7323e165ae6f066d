"""The programs of `add_mask_lora`: shrink, expand, and the one that closes."""

import triton
import triton.language as tl


# Sizes that change from step to step: not worth a compilation of their own.
@triton.jit(do_not_specialize=["capacity", "num_rows", "row_programs", "max_tiles"])
def add_mask_lora_kernel(
    out_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    parts_ptr,
    mask_rows_ptr,
    num_mask_rows_ptr,
    low_ptr,
    arrivals_ptr,
    capacity,
    num_rows,
    row_programs,
    max_tiles,
    in_features,
    low_features,
    x_stride,
    out_stride,
    NUM_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Shrink, expand or close, by when the program started: whatever it waits for has started before it."""
    num = tl.minimum(tl.load(num_mask_rows_ptr).to(tl.int32), capacity)
    passed_ptr = arrivals_ptr + max_tiles
    # programs of one row tile
    num_shrink = tl.cdiv(low_features, BLOCK_LOW) * NUM_SPLITS
    num_expand = (tl.num_programs(0) - 1) // row_programs - num_shrink
    tickets_ptr = passed_ptr + max_tiles
    program = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    place = program - row_programs * num_shrink
    if place < 0:
        _shrink(
            x_ptr,
            a_ptr,
            low_ptr,
            mask_rows_ptr,
            arrivals_ptr,
            program // num_shrink,
            program % num_shrink // NUM_SPLITS,
            program % NUM_SPLITS,
            num,
            capacity,
            num_rows,
            row_programs,
            in_features,
            low_features,
            x_stride,
            SPLIT,
            BLOCK_M,
            BLOCK_LOW,
            BLOCK_K,
        )
    else:
        part, column_tile, first, end = _column_tile(
            parts_ptr, place % num_expand, NUM_PARTS, BLOCK_N
        )
        if program == tl.num_programs(0) - 1:
            tl.store(tickets_ptr, 0)  # the last one was drawn
            _close(arrivals_ptr, passed_ptr, tl.cdiv(num, BLOCK_M), num_expand)
        elif (first % 16 == 0) & (end % 16 == 0):
            # The compiler sees the factor, and moves 16 bytes at once.
            _expand(
                out_ptr,
                b_ptr,
                low_ptr,
                mask_rows_ptr,
                arrivals_ptr,
                passed_ptr,
                place // num_expand,
                part,
                column_tile,
                first // 16 * 16,
                end // 16 * 16,
                num,
                capacity,
                num_rows,
                row_programs,
                num_shrink,
                low_features,
                out_stride,
                RANK,
                NUM_SPLITS,
                BLOCK_SPLITS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_RANK,
            )
        else:
            _expand(
                out_ptr,
                b_ptr,
                low_ptr,
                mask_rows_ptr,
                arrivals_ptr,
                passed_ptr,
                place // num_expand,
                part,
                column_tile,
                first,
                end,
                num,
                capacity,
                num_rows,
                row_programs,
                num_shrink,
                low_features,
                out_stride,
                RANK,
                NUM_SPLITS,
                BLOCK_SPLITS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_RANK,
            )


@triton.jit
def _shrink(
    x_ptr,
    a_ptr,
    low_ptr,
    mask_rows_ptr,
    arrived_ptr,
    first_tile,
    low_tile,
    split,
    num,
    capacity,
    num_rows,
    row_programs,
    in_features,
    low_features,
    x_stride,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """low[split, i] = x[mask_rows[i], the split's features] A^T: some row tiles, one low tile."""
    column = low_tile * BLOCK_LOW + tl.arange(0, BLOCK_LOW)
    for tile in range(first_tile, tl.cdiv(num, BLOCK_M), row_programs):
        index, row, exists = _rows(mask_rows_ptr, tile, num, num_rows, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_LOW], dtype=tl.float32)
        for start in range(0, SPLIT, BLOCK_K):
            feature = split * SPLIT + start + tl.arange(0, BLOCK_K)
            inside = feature < in_features
            x = tl.load(
                x_ptr + row[:, None] * x_stride + feature[None, :],
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + column[None, :].to(tl.int64) * in_features + feature[:, None],
                mask=(column < low_features)[None, :] & inside[:, None],
                other=0.0,
            )
            acc = tl.dot(x, a, acc, input_precision="ieee")
        place = split.to(tl.int64) * capacity + index
        tl.store(
            low_ptr + place[:, None] * low_features + column[None, :],
            acc,
            mask=exists[:, None] & (column < low_features)[None, :],
        )
        # One thread counts the program's arrival: after the stores of all its threads.
        tl.debug_barrier()
        tl.atomic_add(arrived_ptr + tile, 1, sem="release")


@triton.jit
def _expand(
    out_ptr,
    b_ptr,
    low_ptr,
    mask_rows_ptr,
    arrived_ptr,
    passed_ptr,
    first_tile,
    part,
    column_tile,
    first,
    end,
    num,
    capacity,
    num_rows,
    row_programs,
    num_shrink,
    low_features,
    out_stride,
    RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """out[mask_rows[i], a tile of one part's columns] += (sum of the splits of low[i]) B^T: some row tiles."""
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column >= first) & (column < end)
    rank = tl.arange(0, BLOCK_RANK)
    split = tl.arange(0, BLOCK_SPLITS)
    b = tl.load(
        b_ptr + column[None, :].to(tl.int64) * RANK + rank[:, None],
        mask=inside[None, :] & (rank < RANK)[:, None],
        other=0.0,
    )
    for tile in range(first_tile, tl.cdiv(num, BLOCK_M), row_programs):
        index, row, exists = _rows(mask_rows_ptr, tile, num, num_rows, BLOCK_M)
        address = out_ptr + row[:, None] * out_stride + column[None, :]
        out_mask = exists[:, None] & inside[None, :]
        out = tl.load(address, mask=out_mask, other=0.0)
        arrived = tl.atomic_add(arrived_ptr + tile, 0, sem="acquire")
        while arrived < num_shrink:
            arrived = tl.atomic_add(arrived_ptr + tile, 0, sem="acquire")
        tl.atomic_add(passed_ptr + tile, 1, sem="relaxed")
        # All splits in one load: in turn they would take as many trips to memory.
        place = split[:, None].to(tl.int64) * capacity + index[None, :]
        low = tl.load(
            low_ptr + place[:, :, None] * low_features + (part * RANK + rank)[None, None, :],
            mask=(split < NUM_SPLITS)[:, None, None]
            & exists[None, :, None]
            & (rank < RANK)[None, None, :],
            other=0.0,
        )
        delta = tl.dot(tl.sum(low, axis=0).to(b.dtype), b, input_precision="ieee")
        tl.store(address, (out.to(tl.float32) + delta).to(out.dtype), mask=out_mask)


@triton.jit
def _close(arrived_ptr, passed_ptr, num_tiles, num_expand, BLOCK: tl.constexpr = 128):
    """Set the counts of a row tile back to zero when all expand programs have read them, those of no columns too."""
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        used = tile < num_tiles
        waiting = 1
        while waiting > 0:
            passed = tl.load(passed_ptr + tile, mask=used, other=num_expand, volatile=True)
            waiting = tl.sum((passed < num_expand).to(tl.int32))
        tl.store(arrived_ptr + tile, 0, mask=used)
        tl.store(passed_ptr + tile, 0, mask=used)


@triton.jit
def _rows(mask_rows_ptr, tile, num, num_rows, BLOCK_M: tl.constexpr):
    """A tile's places among the mask rows, its rows of the step, and which of them there are."""
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(mask_rows_ptr + index, mask=index < num, other=num_rows)
    return index, row, row < num_rows


@triton.jit
def _column_tile(parts_ptr, place, NUM_PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (part, tile of columns, first column and end of the part) of an expand program.

    Tiles begin at multiples of their size, whatever the parts; a program after the last tile gets an empty part.
    """
    part, column_tile, first, end, num_tiles = 0, 0, 0, 0, 0
    for p in tl.static_range(NUM_PARTS):
        begin = tl.load(parts_ptr + 2 * p)
        stop = tl.load(parts_ptr + 2 * p + 1)
        own = place - num_tiles
        num_tiles += tl.cdiv(stop, BLOCK_N) - begin // BLOCK_N
        here = (own >= 0) & (place < num_tiles)
        part = tl.where(here, p, part)
        column_tile = tl.where(here, begin // BLOCK_N + own, column_tile)
        first = tl.where(here, begin, first)
        end = tl.where(here, stop, end)
    return part, column_tile, first, end

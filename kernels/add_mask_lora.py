"""Low-rank deltas of a linear layer, for a step's mask rows only: one launch a layer.

The first programs of the launch *shrink*: x of the mask rows times A, split along the input features so that few
rows fill the machine. The programs after them *expand*: they fetch B and the output, wait until the shrink
programs of their row tile have arrived, sum the splits, multiply by B and add. The last program *closes*: when all
have passed, it sets the counts of arrivals back to zero.

Which rows, and how many, are read from the device: the launch depends on shapes alone, and a CUDA graph can hold
it. With no mask rows all programs end at once. Atomics count arrivals and nothing else: each number is written
by one program, and its sums go in an order that depends on the layer alone. A program waits only for programs in
front of it in the grid, and shrink programs never wait; a GPU starts programs in that order, so a grid larger than
the machine ends, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .checks import TRITON_TYPES, check_device, check_tensor
from .shipped import Shipped

# Mask rows of a tile: the fewest that tensor cores multiply.
ROW_TILE = 16
# Row tiles of a launch that run side by side; the rest in turn. Steps have few mask rows but may have
# thousands of others, and the launch cannot know.
MAX_ROW_PROGRAMS = 8
# An expand program holds all splits of a row in registers: at most so many splits, and splits times low features.
MAX_SPLITS = 16
MAX_LOW = 1024
# Element size -> bytes of B that each warp of an expand program keeps in registers. Products in fp32 do not
# go to tensor cores and want registers of their own.
B_BYTES = {2: 4 * 1024, 4: 2 * 1024}
NUM_STAGES = 4
_SIZES = (
    "capacity",
    "num_rows",
    "row_programs",
    "max_tiles",
    "in_features",
    "low_features",
    "x_stride",
    "out_stride",
)


@dataclass(frozen=True)
class Tiles:
    """Of one layer; never a function of the batch.

    Attributes:
        rows: mask rows of a tile.
        split: input features that one shrink program sums up; `step`: at once.
        low: stacked low features of a shrink program.
        rank: low features that an expand program multiplies, at least the layer's rank.
        out: output columns of an expand program.
        warps: of every program.
    """

    rows: int
    split: int
    step: int
    low: int
    rank: int
    out: int
    warps: int

    def constexprs(self, num_parts: int, rank: int, in_features: int) -> dict[str, int]:
        """What the kernel of a layer is compiled for."""
        num_splits = triton.cdiv(in_features, self.split)
        return {
            "NUM_PARTS": num_parts,
            "RANK": rank,
            "NUM_SPLITS": num_splits,
            "BLOCK_SPLITS": triton.next_power_of_2(num_splits),
            "SPLIT": self.split,
            "BLOCK_M": self.rows,
            "BLOCK_LOW": self.low,
            "BLOCK_K": self.step,
            "BLOCK_N": self.out,
            "BLOCK_RANK": self.rank,
        }


@cache
def choose_tiles(in_features: int, rank: int, element_size: int) -> Tiles:
    """Return the tiles of a layer: the largest that compile without spills."""
    padded = max(16, triton.next_power_of_2(rank))
    warps = 4 if padded <= 32 else 8
    columns = warps * B_BYTES[element_size] // (padded * element_size)
    max_splits = max(1, min(MAX_SPLITS, MAX_LOW // padded))
    return Tiles(
        rows=ROW_TILE,
        split=max(512, triton.next_power_of_2(triton.cdiv(in_features, max_splits))),
        step=256 // element_size,
        low=min(padded, 32),
        rank=padded,
        out=min(max(columns, 64), 32 * warps),
        warps=warps,
    )


def make_arrivals(capacity: int, device: torch.device) -> torch.Tensor:
    """Return `[2, row tiles]` int32 zeros: the counts of arrivals for up to `capacity` mask rows.

    Layers share them, as long as their launches follow one another on one stream.
    """
    return torch.zeros(2, triton.cdiv(capacity, ROW_TILE), dtype=torch.int32, device=device)


def add_mask_lora(
    # [rows, out], changed in place
    output: torch.Tensor,
    # [rows, in]
    x: torch.Tensor,
    # [parts * rank, in]
    lora_a: torch.Tensor,
    # [out, rank], the scale folded in
    lora_b: torch.Tensor,
    # [parts, 2] int32, first column of each part in the output, and the one behind its last
    parts: torch.Tensor,
    # [capacity] int64, rows of the step that are mask rows, in front
    mask_rows: torch.Tensor,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor,
    # [2, row tiles] int32 of make_arrivals: zeros before and after
    arrivals: torch.Tensor,
) -> None:
    """`output[r, columns of part p] += B_p A_p x[r]` for every mask row r; other rows are not touched.

    Sums are fp32; the low features are rounded to the dtype of B in between.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    check_device(_add_mask_lora_kernel, output.device)
    _check(output, x, lora_a, lora_b, parts, mask_rows, num_mask_rows, arrivals)
    (num_rows, in_features), low_features = x.shape, len(lora_a)
    capacity = min(num_rows, len(mask_rows))
    if capacity == 0:
        return
    tiles = choose_tiles(in_features, lora_b.shape[1], x.element_size())
    constexprs = tiles.constexprs(len(parts), lora_b.shape[1], in_features)
    num_splits = constexprs["NUM_SPLITS"]
    row_programs = min(triton.cdiv(capacity, tiles.rows), MAX_ROW_PROGRAMS)
    shrink_programs = triton.cdiv(low_features, tiles.low) * num_splits
    # Every part but the first may begin a tile of its own.
    expand_programs = triton.cdiv(output.shape[1], tiles.out) + len(parts) - 1
    low = torch.empty(num_splits, capacity, low_features, dtype=torch.float32, device=x.device)
    _add_mask_lora_kernel[(row_programs * (shrink_programs + expand_programs) + 1,)](
        output,
        x,
        lora_a,
        lora_b,
        parts,
        mask_rows,
        num_mask_rows,
        low,
        arrivals,
        capacity,
        num_rows,
        row_programs,
        arrivals.stride(0),
        in_features,
        low_features,
        x.stride(0),
        output.stride(0),
        **constexprs,
        num_warps=tiles.warps,
        num_stages=NUM_STAGES,
    )


# Sizes that change from step to step: not worth a compilation of their own.
@triton.jit(do_not_specialize=["capacity", "num_rows", "row_programs", "max_tiles"])
def _add_mask_lora_kernel(
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
    """Shrink, expand or close, by the program's place in the grid."""
    num = tl.minimum(tl.load(num_mask_rows_ptr).to(tl.int32), capacity)
    passed_ptr = arrivals_ptr + max_tiles
    # programs of one row tile
    num_shrink = tl.cdiv(low_features, BLOCK_LOW) * NUM_SPLITS
    num_expand = (tl.num_programs(0) - 1) // row_programs - num_shrink
    program = tl.program_id(0)
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
        part, column_tile, first, end, num_passing = _column_tile(
            parts_ptr, place % num_expand, NUM_PARTS, BLOCK_N
        )
        if program == tl.num_programs(0) - 1:
            _close(arrivals_ptr, passed_ptr, tl.cdiv(num, BLOCK_M), num_passing)
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
def _close(arrived_ptr, passed_ptr, num_tiles, num_passing, BLOCK: tl.constexpr = 128):
    """Set the counts of a row tile back to zero when all expand programs have read them."""
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        used = tile < num_tiles
        waiting = 1
        while waiting > 0:
            passed = tl.load(passed_ptr + tile, mask=used, other=num_passing, volatile=True)
            waiting = tl.sum((passed < num_passing).to(tl.int32))
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
    """Return (part, tile of columns, first column and end of the part) of an expand program, and the number of tiles.

    Tiles begin at multiples of their size, whatever the parts; a program behind the last tile gets an empty part.
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
    return part, column_tile, first, end, num_tiles


def shipped() -> list[Shipped]:
    """Every dtype; small and large ranks, few and many splits, layers of one to three parts."""
    configurations = []
    for torch_dtype, dtype in TRITON_TYPES.items():
        for rank, num_parts, in_features in (
            (16, 3, 576),
            (16, 3, 4096),
            (64, 2, 4096),
            (64, 1, 14336),
            (128, 2, 8192),
        ):
            tiles = choose_tiles(in_features, rank, torch_dtype.itemsize)
            configurations.append(
                Shipped(
                    name=f"{dtype} rank {rank}, {num_parts} from {in_features}",
                    kernel=_add_mask_lora_kernel,
                    signature={
                        **{f"{name}_ptr": f"*{dtype}" for name in ("out", "x", "a", "b")},
                        "parts_ptr": "*i32",
                        "mask_rows_ptr": "*i64",
                        "num_mask_rows_ptr": "*i64",
                        "low_ptr": "*fp32",
                        "arrivals_ptr": "*i32",
                        **dict.fromkeys(_SIZES, "i32"),
                    },
                    constexprs=tiles.constexprs(num_parts, rank, in_features),
                    num_warps=tiles.warps,
                    num_stages=NUM_STAGES,
                    divisible=("in_features", "low_features", "x_stride", "out_stride"),
                    tensor_cores=dtype != "fp32",
                )
            )
    return configurations


def _check(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    parts: torch.Tensor,
    mask_rows: torch.Tensor,
    num_mask_rows: torch.Tensor,
    arrivals: torch.Tensor,
) -> None:
    device, dtype = output.device, output.dtype
    if dtype not in TRITON_TYPES:
        wanted = ", ".join(map(str, TRITON_TYPES))
        raise ValueError(f"output has dtype {dtype}, expected one of {wanted}.")
    check_tensor("output", output, [None, None], [dtype], device, contiguous=False)
    check_tensor("x", x, [len(output), None], [dtype], device, contiguous=False)
    check_tensor("parts", parts, [None, 2], [torch.int32], device)
    check_tensor("lora_b", lora_b, [output.shape[1], None], [dtype], device)
    check_tensor("lora_a", lora_a, [len(parts) * lora_b.shape[1], x.shape[1]], [dtype], device)
    check_tensor("mask_rows", mask_rows, [None], [torch.int64], device)
    check_tensor("num_mask_rows", num_mask_rows, [1], [torch.int64], device)
    check_tensor("arrivals", arrivals, [2, None], [torch.int32], device)
    row_tiles = triton.cdiv(min(len(output), len(mask_rows)), ROW_TILE)
    if arrivals.shape[1] < row_tiles:
        raise ValueError(
            f"arrivals has room for {arrivals.shape[1]} row tiles, expected at least {row_tiles}."
        )

"""Low-rank deltas of a linear layer, for a step's mask rows only: two launches a layer.

`shrink` reads A once: x of the mask rows times A, split along the input features so that few rows fill the
machine. `expand` sums the splits, in their order, multiplies by B and adds to the output. Both read which
rows, and how many, from the device: the launch depends on shapes alone, and a CUDA graph can hold it. With no
mask rows both end at once. No atomics: each number is written by one program, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import TRITON_TYPES, check_device, check_tensor
from .shipped import Shipped

# Row tiles of a launch that run side by side; the rest in turn. Steps have few mask rows but may have
# thousands of others, and the launch cannot know.
MAX_ROW_PROGRAMS = 8


@dataclass(frozen=True)
class Tiles:
    """Of both kernels; never a function of the batch.

    Attributes:
        rows: mask rows of a tile.
        low: stacked low features of a tile of `shrink`.
        split: input features that one program of `shrink` sums up; `step`: at once.
        out: output columns of a tile of `expand`; `rank`: low features that it multiplies at once.
    """

    rows: int = 16
    low: int = 64
    split: int = 512
    step: int = 64
    out: int = 64
    rank: int = 32
    # With 4, `expand` spills a few bytes on sm_90 and sm_100 (python -m bita_kernels.aot).
    expand_warps: int = 8


TILES = Tiles()


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
) -> None:
    """`output[r, columns of part p] += B_p A_p x[r]` for every mask row r; other rows are not touched.

    Sums are fp32; the low features are rounded to the dtype of B in between.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    check_device(_shrink_kernel, output.device)
    _check(output, x, lora_a, lora_b, parts, mask_rows, num_mask_rows)
    num_rows, in_features = x.shape
    low_features, rank = lora_a.shape[0], lora_b.shape[1]
    capacity = min(num_rows, len(mask_rows))
    if capacity == 0:
        return
    num_splits = triton.cdiv(in_features, TILES.split)
    row_programs = min(triton.cdiv(capacity, TILES.rows), MAX_ROW_PROGRAMS)
    low = torch.empty(num_splits, capacity, low_features, dtype=torch.float32, device=x.device)
    _shrink_kernel[row_programs, triton.cdiv(low_features, TILES.low), num_splits](
        x,
        lora_a,
        low,
        mask_rows,
        num_mask_rows,
        capacity,
        num_rows,
        in_features,
        low_features,
        x.stride(0),
        SPLIT=TILES.split,
        BLOCK_M=TILES.rows,
        BLOCK_N=TILES.low,
        BLOCK_K=TILES.step,
    )
    _expand_kernel[row_programs, triton.cdiv(output.shape[1], TILES.out), len(parts)](
        output,
        low,
        lora_b,
        parts,
        mask_rows,
        num_mask_rows,
        capacity,
        num_rows,
        num_splits,
        low_features,
        output.stride(0),
        RANK=rank,
        BLOCK_RANK=TILES.rank,
        BLOCK_M=TILES.rows,
        BLOCK_N=TILES.out,
        num_warps=TILES.expand_warps,
    )


# Sizes that change from step to step: not worth a compilation of their own.
@triton.jit(do_not_specialize=["capacity", "num_rows"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    mask_rows_ptr,
    num_mask_rows_ptr,
    capacity,
    num_rows,
    in_features,
    low_features,
    x_stride,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """low[split, i] = x[mask_rows[i], the split's features] A^T; a program: some row tiles, one low tile."""
    num = tl.minimum(tl.load(num_mask_rows_ptr).to(tl.int32), capacity)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    for tile in range(tl.program_id(0), tl.cdiv(num, BLOCK_M), tl.num_programs(0)):
        index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.load(mask_rows_ptr + index, mask=index < num, other=num_rows)
        exists = row < num_rows
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
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


@triton.jit(do_not_specialize=["capacity", "num_rows"])
def _expand_kernel(
    out_ptr,
    low_ptr,
    b_ptr,
    parts_ptr,
    mask_rows_ptr,
    num_mask_rows_ptr,
    capacity,
    num_rows,
    num_splits,
    low_features,
    out_stride,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[mask_rows[i], a tile of one part's columns] += (sum of the splits of low[i]) B^T."""
    num = tl.minimum(tl.load(num_mask_rows_ptr).to(tl.int32), capacity)
    part = tl.program_id(2)
    first = tl.load(parts_ptr + 2 * part) + tl.program_id(1) * BLOCK_N
    end = tl.load(parts_ptr + 2 * part + 1)
    if first >= end:  # of a part narrower than the layer
        return
    column = first + tl.arange(0, BLOCK_N)
    inside = column < end
    for tile in range(tl.program_id(0), tl.cdiv(num, BLOCK_M), tl.num_programs(0)):
        index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.load(mask_rows_ptr + index, mask=index < num, other=num_rows)
        exists = row < num_rows
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in tl.static_range(0, RANK, BLOCK_RANK):
            rank = start + tl.arange(0, BLOCK_RANK)
            low = tl.zeros([BLOCK_M, BLOCK_RANK], dtype=tl.float32)
            for split in range(num_splits):
                low += tl.load(
                    low_ptr
                    + (split * capacity + index)[:, None].to(tl.int64) * low_features
                    + (part * RANK + rank)[None, :],
                    mask=exists[:, None] & (rank < RANK)[None, :],
                    other=0.0,
                )
            b = tl.load(
                b_ptr + column[None, :].to(tl.int64) * RANK + rank[:, None],
                mask=inside[None, :] & (rank < RANK)[:, None],
                other=0.0,
            )
            acc = tl.dot(low.to(b.dtype), b, acc, input_precision="ieee")
        address = out_ptr + row[:, None] * out_stride + column[None, :]
        mask = exists[:, None] & inside[None, :]
        out = tl.load(address, mask=mask, other=0.0)
        tl.store(address, (out.to(tl.float32) + acc).to(out.dtype), mask=mask)


def shipped() -> list[Shipped]:
    """Both kernels in every dtype, expand for ranks of half a step, two and four."""
    configurations = []
    for dtype in TRITON_TYPES.values():
        rows = {"mask_rows_ptr": "*i64", "num_mask_rows_ptr": "*i64"}
        counts = ("capacity", "num_rows", "low_features")
        common = rows | dict.fromkeys(counts, "i32")
        names = {"x_ptr": f"*{dtype}", "a_ptr": f"*{dtype}", "low_ptr": "*fp32"}
        configurations.append(
            Shipped(
                name=f"shrink {dtype}",
                kernel=_shrink_kernel,
                signature=common | names | {"in_features": "i32", "x_stride": "i32"},
                constexprs={
                    "SPLIT": TILES.split,
                    "BLOCK_M": TILES.rows,
                    "BLOCK_N": TILES.low,
                    "BLOCK_K": TILES.step,
                },
                divisible=("in_features", "low_features", "x_stride"),
                tensor_cores=dtype != "fp32",
            )
        )
        names = {
            "out_ptr": f"*{dtype}",
            "b_ptr": f"*{dtype}",
            "low_ptr": "*fp32",
            "parts_ptr": "*i32",
        }
        for rank in (16, 64, 128):
            configurations.append(
                Shipped(
                    name=f"expand {dtype} rank {rank}",
                    kernel=_expand_kernel,
                    signature=common | names | {"num_splits": "i32", "out_stride": "i32"},
                    constexprs={
                        "RANK": rank,
                        "BLOCK_RANK": TILES.rank,
                        "BLOCK_M": TILES.rows,
                        "BLOCK_N": TILES.out,
                    },
                    num_warps=TILES.expand_warps,
                    divisible=("low_features", "out_stride"),
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

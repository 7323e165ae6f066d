"""Low-rank deltas of a linear layer, for a step's mask rows only: one launch a layer.

The first programs of the launch *shrink*: x of the mask rows times A, split along the input features so that few
rows fill the machine. The programs after them *expand*: they fetch B and the output, wait until the shrink
programs of their row tile have arrived, sum the splits, multiply by B and add. The last program *closes*: when all
have passed, it sets the counts of arrivals back to zero.

Which rows, and how many, are read from the device: the launch depends on shapes alone, and a CUDA graph can hold
it. With no mask rows all programs end at once. Atomics count arrivals and nothing else: each number is written
by one program, and its sums go in an order that depends on the layer alone. What a program does goes by a ticket that
it draws when it starts: it waits only for programs that started before it, and shrink programs never wait, so a grid
larger than the machine ends, in whatever order a GPU starts its programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from .add_mask_lora_kernel import add_mask_lora_kernel
from .checks import TRITON_TYPES, check_device, check_tensor
from .shipped import Shipped

# Mask rows of a tile: the fewest that tensor cores multiply.
ROW_TILE = 16
# Row tiles of a launch that run side by side; the rest in turn. Steps have few mask rows but may have
# thousands of others, and the launch cannot know.
MAX_ROW_PROGRAMS = 16
# An expand program holds all splits of a row in registers: at most so many splits, and splits times low features.
MAX_SPLITS = 16
MAX_LOW = 1024
# Element size -> bytes of B that each warp of an expand program keeps in registers. Products in fp32 do not
# go to tensor cores and want registers of their own.
B_BYTES = {2: 4 * 1024, 4: 2 * 1024}
# Element size -> stages: in fp32 a fourth one spills on sm_120.
NUM_STAGES = {2: 4, 4: 3}
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
        out=min(max(columns, 64), 256),
        warps=warps,
    )


def make_arrivals(capacity: int, device: torch.device) -> torch.Tensor:
    """Return `[3, row tiles]` int32 zeros for up to `capacity` mask rows: arrivals, passings, tickets.

    Launches that may overlap need counts of their own.
    """
    return torch.zeros(3, triton.cdiv(capacity, ROW_TILE), dtype=torch.int32, device=device)


def add_mask_lora(
    # [rows, out], changed in place
    output: torch.Tensor,
    # [rows, in]
    x: torch.Tensor,
    # [parts * rank, in]
    lora_a: torch.Tensor,
    # [out, rank], the scale folded in
    lora_b: torch.Tensor,
    # [parts, 2] int32, first column of each part in the output, and the one after its last
    parts: torch.Tensor,
    # [capacity] int64, rows of the step that are mask rows, in front
    mask_rows: torch.Tensor,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor,
    # [3, row tiles] int32 of make_arrivals: zeros before and after
    arrivals: torch.Tensor,
) -> None:
    """`output[r, columns of part p] += B_p A_p x[r]` for every mask row r; other rows are not touched.

    Sums are fp32; the low features are rounded to the dtype of B in between.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    check_device(add_mask_lora_kernel, output.device)
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
    add_mask_lora_kernel[(row_programs * (shrink_programs + expand_programs) + 1,)](
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
        num_stages=NUM_STAGES[x.element_size()],
    )


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
                    kernel=add_mask_lora_kernel,
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
                    num_stages=NUM_STAGES[torch_dtype.itemsize],
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
    check_tensor("arrivals", arrivals, [3, None], [torch.int32], device)
    row_tiles = triton.cdiv(min(len(output), len(mask_rows)), ROW_TILE)
    if arrivals.shape[1] < row_tiles:
        raise ValueError(
            f"arrivals has room for {arrivals.shape[1]} row tiles, expected at least {row_tiles}."
        )

"""The best tokens of each chunk of a vocabulary, which is too long for one program: `build_block` merges them.

Values and ids travel as one int64 key, so that the order is total: higher logit first, then the lower token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import TRITON_TYPES
from .shipped import Shipped
from .tree_table import TreeTable

MAX_RANK = 16
# Tokens a program ranks: 32 keys a thread. V = 128k makes 32 programs a row.
CHUNK = 4096
# Below the key of any token.
NO_KEY = tl.constexpr(-(2**63))
HIGHEST_ID = tl.constexpr(2**31 - 1)


def num_chunks(vocab_size: int) -> int:
    """Programs that rank a row."""
    return triton.cdiv(vocab_size, CHUNK)


@dataclass(frozen=True)
class Ranking:
    """Scratch memory of `build_block`, for B requests: D = max_depth rows each, k = max_rank ranks.

    Attributes:
        keys: `[B * D, chunks, k]` int64, best keys of each chunk.
        log_sums: `[B * D, chunks]` fp32, log of the sum of the exponentials of each chunk's logits.
        top: `[B * D, k]` int64, best keys of each row.
        probabilities: `[B * D, k]` fp32, of those.
    """

    keys: torch.Tensor
    log_sums: torch.Tensor
    top: torch.Tensor
    probabilities: torch.Tensor

    @classmethod
    def of(cls, num_requests: int, vocab_size: int, table: TreeTable) -> Ranking:
        """Allocate it on the table's device."""
        rows, chunks = num_requests * table.max_depth, num_chunks(vocab_size)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=table.device)

        return cls(
            keys=empty(chunks, table.max_rank, dtype=torch.int64),
            log_sums=empty(chunks, dtype=torch.float32),
            top=empty(table.max_rank, dtype=torch.int64),
            probabilities=empty(table.max_rank, dtype=torch.float32),
        )


def rank_tokens(
    # [number of logits rows, V] fp32, fp16 or bf16; rows may be strided
    logits: torch.Tensor,
    # [B, D] int64, row of `logits` that predicts depth d+1
    logits_rows: torch.Tensor,
    # [B] int32, depths that have such a row
    depths: torch.Tensor,
    # depths that are wanted at most
    most_depths: int,
    ranking: Ranking,
    # whether log_sums are wanted, too
    sums: bool,
) -> None:
    """Fill `ranking.keys` and `ranking.log_sums` for the rows that there are."""
    max_depth = logits_rows.shape[1]
    rows, chunks, num_ranks = len(depths) * max_depth, *ranking.keys.shape[1:]
    _rank_tokens_kernel[(rows, chunks)](
        logits,
        logits_rows,
        depths,
        ranking.keys,
        ranking.log_sums,
        logits.stride(0),
        logits.shape[1],
        most_depths,
        max_depth,
        CHUNK=CHUNK,
        NUM_RANKS=num_ranks,
        SUMS=sums,
    )


@triton.jit(do_not_specialize=["most_depths"])
def _rank_tokens_kernel(
    logits_ptr,
    logits_rows_ptr,
    depths_ptr,
    keys_ptr,
    log_sums_ptr,
    logits_stride,
    vocab_size,
    most_depths,
    max_depth,
    CHUNK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Best NUM_RANKS keys of one chunk of one mask row, best first."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    depths = tl.minimum(tl.load(depths_ptr + row // max_depth), most_depths)
    if row % max_depth < depths:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < vocab_size
        logits_row = tl.load(logits_rows_ptr + row)
        logit = tl.load(
            logits_ptr + logits_row * logits_stride + token, mask=inside, other=float("-inf")
        ).to(tl.float32)
        if SUMS:
            highest = tl.max(logit, axis=0)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            log_sum = base + tl.log(tl.sum(tl.exp(logit - base), axis=0))
            tl.store(log_sums_ptr + row * tl.num_programs(1) + chunk, log_sum)
        # One bit pattern for what compares equal (-0 and 0), and one for all NaNs, above infinity.
        logit = tl.where(logit == 0.0, 0.0, logit)
        bits = tl.where(logit == logit, logit.to(tl.int32, bitcast=True), 0x7FC00000)
        # As integers, bit patterns of negative numbers run backwards: turn them round.
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) + (HIGHEST_ID - token)
        key = tl.where(inside, key, NO_KEY)
        out = keys_ptr + (row * tl.num_programs(1) + chunk) * NUM_RANKS
        for rank in tl.static_range(NUM_RANKS):
            best = tl.max(key, axis=0)
            tl.store(out + rank, best)
            key = tl.where(key == best, NO_KEY, key)


def shipped() -> list[Shipped]:
    """Logits types, the paper's tree (5 ranks) and the most ranks, with sums (a set of trees) and without."""
    signature = {"logits_rows_ptr": "*i64", "depths_ptr": "*i32", "keys_ptr": "*i64"}
    signature |= {"log_sums_ptr": "*fp32"}
    integers = ("logits_stride", "vocab_size", "most_depths", "max_depth")
    signature |= dict.fromkeys(integers, "i32")
    return [
        Shipped(
            name=f"{num_ranks} ranks {dtype}{' sums' if sums else ''}",
            kernel=_rank_tokens_kernel,
            signature={"logits_ptr": f"*{dtype}", **signature},
            constexprs={"CHUNK": CHUNK, "NUM_RANKS": num_ranks, "SUMS": sums},
            divisible=("logits_stride", "vocab_size"),
        )
        for num_ranks in (5, MAX_RANK)
        for dtype in TRITON_TYPES.values()
        for sums in (False, True)
    ]

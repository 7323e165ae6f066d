"""Masks as candidates: the best tokens of a vocabulary, which is too long for one program, and their probabilities.

Values and ids travel as one int64 key, so that the order is total: higher logit first, then the lower token id.

`torch.topk` returns the same values; which of several *equal* logits it returns, and in what order, it
leaves open. NaN counts as the greatest value, as in torch; here all NaNs are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .candidates import Candidates
from .checks import INT32, TRITON_TYPES, check_device, check_tensor, kind_of, remember
from .shipped import Shipped

MAX_RANK = 16
# Tokens a program ranks: 32 keys a thread. V = 128k makes 32 programs a row.
CHUNK = 4096
# Below the key of any token.
NO_KEY = tl.constexpr(-(2**63))
HIGHEST_ID = tl.constexpr(2**31 - 1)
LOW_BITS = tl.constexpr(2**32 - 1)

_checked: set[object] = set()


def num_chunks(vocab_size: int) -> int:
    """Programs that rank a row."""
    return triton.cdiv(vocab_size, CHUNK)


@dataclass(frozen=True)
class Ranking:
    """Scratch memory of `rank_tokens`, for up to B requests of D depths, k ranks each.

    Attributes:
        keys: `[B * D, chunks, k]` int64, best keys of each chunk.
        log_sums: `[B * D, chunks]` fp32, log of the sum of the exponentials of each chunk's logits.
        arrived: `[B * D]` int32, chunks that are done: 0 before a launch and after it.
    """

    keys: torch.Tensor
    log_sums: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def of(
        cls,
        num_requests: int,
        vocab_size: int,
        num_depths: int,
        num_ranks: int,
        device: torch.device | str,
    ) -> Ranking:
        """Allocate it on a device."""
        rows, chunks = num_requests * num_depths, num_chunks(vocab_size)
        return cls(
            keys=torch.empty(rows, chunks, num_ranks, dtype=torch.int64, device=device),
            log_sums=torch.empty(rows, chunks, dtype=torch.float32, device=device),
            arrived=torch.zeros(rows, dtype=torch.int32, device=device),
        )


def rank_tokens(
    # [number of logits rows, V] fp32, fp16 or bf16; rows may be strided
    logits: torch.Tensor,
    # [B, D] int64, row of `logits` that predicts depth d+1; read for the depths that are wanted only; may be strided
    logits_rows: torch.Tensor,
    # depths that are wanted at most
    most_depths: int,
    # whether chances are wanted, too
    chances: bool,
    # scratch for B requests or more
    ranking: Ranking,
    # Its tokens and chances are outputs, of D depths, and may be strided alike; its depths say which rows there are
    candidates: Candidates,
) -> None:
    """Write the best tokens of each depth's row, best first, and their probabilities.

    Every program ranks one chunk of one row. The last of a row to be done merges the row's chunks.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit; more than 16 ranks; a vocabulary with
            fewer tokens than ranks.
    """
    tensors = (logits, logits_rows, *vars(ranking).values(), *vars(candidates).values())
    kind = kind_of(tensors)
    if kind not in _checked:
        _check(logits, logits_rows, ranking, candidates)
        remember(kind, _checked)
    num_requests, num_depths, num_ranks = candidates.tokens.shape
    chunks = ranking.keys.shape[1]
    if num_requests == 0:
        return
    _rank_tokens_kernel[(num_requests * num_depths, chunks)](
        logits,
        logits_rows,
        candidates.depths,
        ranking.keys,
        ranking.log_sums,
        ranking.arrived,
        candidates.tokens,
        candidates.chance,
        logits.stride(0),
        logits_rows.stride(0),
        *candidates.tokens.stride()[:2],
        logits.shape[1],
        most_depths,
        num_depths,
        CHUNK=CHUNK,
        NUM_RANKS=num_ranks,
        CHANCES=chances,
        BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        BLOCK_KEYS=triton.next_power_of_2(chunks * num_ranks),
    )


def _check(
    logits: torch.Tensor,
    logits_rows: torch.Tensor,
    ranking: Ranking,
    candidates: Candidates,
) -> None:
    device = candidates.tokens.device
    check_device(_rank_tokens_kernel, device)
    tokens, chance = candidates.tokens, candidates.chance
    check_tensor("candidates.tokens", tokens, [None] * 3, [torch.int64], device, contiguous=False)
    num_requests, num_depths, num_ranks = tokens.shape
    if num_ranks > MAX_RANK:
        raise ValueError(
            f"candidates have {num_ranks} ranks, expected at most {MAX_RANK} for each depth."
        )
    check_tensor(
        "candidates.chance", chance, tokens.shape, [torch.float32], device, contiguous=False
    )
    if chance.stride() != tokens.stride():
        raise ValueError(
            f"candidates.chance has strides {list(chance.stride())}, expected those of "
            f"candidates.tokens, {list(tokens.stride())}."
        )
    check_tensor("candidates.depths", candidates.depths, [num_requests], INT32, device)
    check_tensor("logits", logits, [None, None], list(TRITON_TYPES), device, contiguous=False)
    if logits.shape[1] < num_ranks:
        raise ValueError(
            f"logits has {logits.shape[1]} tokens, expected at least {num_ranks}: the templates' ranks."
        )
    check_tensor(
        "logits_rows",
        logits_rows,
        [num_requests, num_depths],
        [torch.int64],
        device,
        contiguous=False,
    )
    chunks = num_chunks(logits.shape[1])
    for name, wanted, dtype in (
        ("keys", [None, chunks, num_ranks], torch.int64),
        ("log_sums", [None, chunks], torch.float32),
        ("arrived", [None], torch.int32),
    ):
        tensor = getattr(ranking, name)
        check_tensor(f"ranking.{name}", tensor, wanted, [dtype], device)
        if len(tensor) < num_requests * num_depths:
            raise ValueError(
                f"ranking.{name} has {len(tensor)} rows, expected at least {num_requests * num_depths}."
            )


@triton.jit(do_not_specialize=["most_depths"])
def _rank_tokens_kernel(
    logits_ptr,
    logits_rows_ptr,
    depths_ptr,
    keys_ptr,
    log_sums_ptr,
    arrived_ptr,
    tokens_ptr,
    chance_ptr,
    logits_stride,
    rows_stride,
    request_stride,
    depth_stride,
    vocab_size,
    most_depths,
    num_depths,
    CHUNK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    CHANCES: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Best NUM_RANKS keys of one chunk of one mask row, best first; with the row's last chunk, those of the row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    request, depth = row // num_depths, row % num_depths
    depths = tl.minimum(tl.load(depths_ptr + request), most_depths)
    if depth < depths:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < vocab_size
        logits_row = tl.load(logits_rows_ptr + request * rows_stride + depth)
        logit = tl.load(
            logits_ptr + logits_row * logits_stride + token, mask=inside, other=float("-inf")
        ).to(tl.float32)
        if CHANCES:
            highest = tl.max(logit, axis=0)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            log_sum = base + tl.log(tl.sum(tl.exp(logit - base), axis=0))
            tl.store(log_sums_ptr + row * chunks + chunk, log_sum)
        # One bit pattern for what compares equal (-0 and 0), and one for all NaNs, above infinity.
        logit = tl.where(logit == 0.0, 0.0, logit)
        bits = tl.where(logit == logit, logit.to(tl.int32, bitcast=True), 0x7FC00000)
        # As integers, bit patterns of negative numbers run backwards: turn them round.
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) + (HIGHEST_ID - token)
        key = tl.where(inside, key, NO_KEY)
        best_ptr = keys_ptr + (row * chunks + chunk) * NUM_RANKS
        for rank in tl.static_range(NUM_RANKS):
            best = tl.max(key, axis=0)
            tl.store(best_ptr + rank, best)
            key = tl.where(key == best, NO_KEY, key)
        # One thread counts the program: after the stores of all its threads.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == chunks - 1:
            tl.store(arrived_ptr + row, 0)
            out = request * request_stride + depth * depth_stride
            _merge(
                keys_ptr + row * chunks * NUM_RANKS,
                log_sums_ptr + row * chunks,
                tokens_ptr + out,
                chance_ptr + out,
                chunks,
                NUM_RANKS,
                CHANCES,
                BLOCK_CHUNKS,
                BLOCK_KEYS,
            )


@triton.jit
def _merge(
    # those of one row, and the next three
    keys_ptr,
    log_sums_ptr,
    tokens_ptr,
    chance_ptr,
    chunks,
    NUM_RANKS: tl.constexpr,
    CHANCES: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the best NUM_RANKS tokens of all chunks of a row, and exp(logit - log of the sum of all exponentials)."""
    index = tl.arange(0, BLOCK_KEYS)
    keys = tl.load(keys_ptr + index, mask=index < chunks * NUM_RANKS, other=NO_KEY)
    if CHANCES:
        chunk = tl.arange(0, BLOCK_CHUNKS)
        parts = tl.load(log_sums_ptr + chunk, mask=chunk < chunks, other=float("-inf"))
        highest = tl.max(parts, axis=0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        log_sum = base + tl.log(tl.sum(tl.exp(parts - base), axis=0))
    for rank in tl.static_range(NUM_RANKS):
        best = tl.max(keys, axis=0)
        tl.store(tokens_ptr + rank, -(best & LOW_BITS) + HIGHEST_ID)
        if CHANCES:
            bits = (best >> 32).to(tl.int32)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            tl.store(chance_ptr + rank, tl.exp(bits.to(tl.float32, bitcast=True) - log_sum))
        keys = tl.where(keys == best, NO_KEY, keys)


def shipped() -> list[Shipped]:
    """Logits types; the paper's tree (5 ranks) at V = 128k, the most ranks at 256k; with chances and without."""
    signature = {"logits_rows_ptr": "*i64", "depths_ptr": "*i32", "keys_ptr": "*i64"}
    signature |= {"log_sums_ptr": "*fp32", "arrived_ptr": "*i32"}
    signature |= {"tokens_ptr": "*i64", "chance_ptr": "*fp32"}
    integers = (
        "logits_stride", "rows_stride", "request_stride", "depth_stride", "vocab_size",
        "most_depths", "num_depths",
    )  # fmt: skip
    signature |= dict.fromkeys(integers, "i32")
    return [
        Shipped(
            name=f"{num_ranks} ranks {dtype}{' chances' if chances else ''}",
            kernel=_rank_tokens_kernel,
            signature={"logits_ptr": f"*{dtype}", **signature},
            constexprs={
                "CHUNK": CHUNK,
                "NUM_RANKS": num_ranks,
                "CHANCES": chances,
                "BLOCK_CHUNKS": triton.next_power_of_2(chunks),
                "BLOCK_KEYS": triton.next_power_of_2(chunks * num_ranks),
            },
            divisible=("logits_stride", "vocab_size"),
        )
        for num_ranks, chunks in ((5, num_chunks(128 * 1024)), (MAX_RANK, num_chunks(256 * 1024)))
        for dtype in TRITON_TYPES.values()
        for chances in (False, True)
    ]

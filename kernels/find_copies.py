"""Copies of what followed a request's last tokens before, on the device: a scan of its text, split over programs.

Two launches of fixed shapes, without a sync. `_scan` compares every place of the text with its end, and leaves the best
key of each split. `_copy` takes the best of these, copies the tokens after it and says how likely they are
(`copy_rules`). Keys order matches by length, then by place, so that the result depends on the text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import INT32, check_device, check_tensor, kind_of, remember
from .copy_rules import KEPT, MAX_COPIES, MAX_MATCH, MIN_MATCH, PRIOR, STRENGTH
from .shipped import Shipped

INT64, FP32 = (torch.int64,), (torch.float32,)
# Places that a program compares together: 8 a thread. A text of 128k tokens is one such block for each split.
BLOCK = 1024
MAX_SPLITS = 128
# Of no match. Others: length of the match * 2**32 + its last place.
NO_KEY = tl.constexpr(-1)

_checked: set[object] = set()


@dataclass(frozen=True)
class CopyState:
    """What is known of requests between steps, by slot, and scratch memory. `empty` makes it.

    Attributes:
        last: `[slots, 5]` int32 of the last call: tokens of the text, its last two tokens, length of the match,
            place of the first copied token. Zeros: there was none.
        evidence: `[slots, 4]` fp32, hits, expected hits, misses, expected misses (`copy_rules`).
        keys: `[slots, splits]` int64, scratch: the best key of each split, by request of the step.
    """

    last: torch.Tensor
    evidence: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def empty(cls, num_slots: int, max_model_len: int, device: torch.device) -> CopyState:
        """Allocate it."""
        splits = min(MAX_SPLITS, triton.cdiv(max_model_len, BLOCK))
        return cls(
            last=torch.zeros(num_slots, 5, dtype=torch.int32, device=device),
            evidence=torch.zeros(num_slots, 4, dtype=torch.float32, device=device),
            keys=torch.zeros(num_slots, splits, dtype=torch.int64, device=device),
        )


def find_copies(
    # [slots, max_model_len] int32, prompt and output of the request in each slot; rows may be strided
    token_ids: torch.Tensor,
    # [slots] int32, tokens of these
    num_tokens: torch.Tensor,
    # [B] int32 or int64, slot of each request of the step; no slot twice
    slots: torch.Tensor,
    # In and out
    state: CopyState,
    # Outputs, which may be strided alike. [B, MAX_COPIES] int64, copied tokens; zeros without a match
    copies: torch.Tensor,
    # [B, MAX_COPIES] fp32, P(copied token i is right | those before it are); zeros without a match
    chances: torch.Tensor,
) -> None:
    """Find the longest suffix of each text that occurred before, of 1 to 32 tokens, and copy the tokens after it.

    Of places that match equally long the last one counts. A copy that comes to the text's end goes on with its own
    tokens. Evidence of another text in the slot is dropped: that is seen at its length and at the last two tokens of
    the last call.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    tensors = (token_ids, num_tokens, slots, *vars(state).values(), copies, chances)
    kind = kind_of(tensors)
    if kind not in _checked:
        _check(*tensors)
        remember(kind, _checked)
    num_requests, splits = len(slots), state.keys.shape[1]
    _scan[(num_requests, splits)](
        token_ids,
        num_tokens,
        slots,
        state.keys,
        token_ids.stride(0),
        BLOCK=BLOCK,
        MIN_MATCH=MIN_MATCH,
        MAX_MATCH=MAX_MATCH,
    )
    _copy[(num_requests,)](
        token_ids,
        num_tokens,
        slots,
        state.keys,
        state.last,
        state.evidence,
        copies,
        chances,
        token_ids.stride(0),
        *copies.stride(),
        splits,
        COPIES=MAX_COPIES,
        BLOCK_COPIES=triton.next_power_of_2(MAX_COPIES),
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        PRIOR=PRIOR,
        STRENGTH=STRENGTH,
        KEPT=KEPT,
        num_warps=1,
    )


@triton.jit
def _scan(
    token_ids_ptr,
    num_tokens_ptr,
    slots_ptr,
    keys_ptr,
    row_stride,
    BLOCK: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
):
    """The best key of one split of one text: blocks of places that are num_splits blocks apart."""
    request, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    text = token_ids_ptr + slot * row_stride
    last = tl.load(num_tokens_ptr + slot) - 1
    best = tl.full([BLOCK], NO_KEY, tl.int64)
    for start in range(split * BLOCK, last, num_splits * BLOCK):
        place = start + tl.arange(0, BLOCK)
        same = place < last
        length = tl.zeros([BLOCK], dtype=tl.int32)
        back, longer = 0, 1
        # Most blocks are done after two tokens.
        while longer > 0:
            same &= place >= back
            token = tl.load(text + place - back, mask=same, other=-1)
            same &= token == tl.load(text + last - back)
            length += same.to(tl.int32)
            back += 1
            longer = tl.where(back < MAX_MATCH, tl.max(same.to(tl.int32), axis=0), 0)
        key = (length.to(tl.int64) << 32) + place
        best = tl.maximum(best, tl.where(length >= MIN_MATCH, key, NO_KEY))
    tl.store(keys_ptr + request.to(tl.int64) * num_splits + split, tl.max(best, axis=0))


@triton.jit
def _copy(
    token_ids_ptr,
    num_tokens_ptr,
    slots_ptr,
    keys_ptr,
    last_ptr,
    evidence_ptr,
    copies_ptr,
    chances_ptr,
    row_stride,
    request_stride,
    depth_stride,
    num_splits,
    COPIES: tl.constexpr,
    BLOCK_COPIES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    PRIOR: tl.constexpr,
    STRENGTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One program a request: judges the slot's last copy, then makes the next one."""
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    text = token_ids_ptr + slot * row_stride
    size = tl.load(num_tokens_ptr + slot)
    last_ptr += slot * 5
    evidence_ptr += slot * 4
    place = tl.arange(0, BLOCK_COPIES)

    seen = tl.load(last_ptr)
    goes_on = (seen >= 2) & (seen <= size)
    goes_on &= tl.load(text + seen - 2, mask=goes_on, other=0) == tl.load(last_ptr + 1)
    goes_on &= tl.load(text + seen - 1, mask=goes_on, other=0) == tl.load(last_ptr + 2)
    length, copy_from = tl.load(last_ptr + 3), tl.load(last_ptr + 4)
    # A copy that came to the text's end went on with its own tokens; a text that took them has them there.
    known = tl.where(goes_on & (length > 0), tl.minimum(COPIES, size - seen), 0)
    copied = tl.load(text + copy_from + place, mask=place < known, other=0)
    taken_now = tl.load(text + seen + place, mask=place < known, other=0)
    taken = tl.min(tl.where((copied == taken_now) & (place < known), known, place), axis=0)
    taken = tl.minimum(taken, known)
    judged = tl.minimum(taken + 1, known)
    agreeing = (length + place).to(tl.float32)
    expected = tl.sum(tl.where(place < judged, agreeing / (agreeing + PRIOR), 0.0), axis=0)
    kept = tl.where(goes_on, tl.where(judged > 0, KEPT, 1.0), 0.0)
    hits = tl.load(evidence_ptr) * kept + taken
    expected_hits = tl.load(evidence_ptr + 1) * kept + expected
    misses = tl.load(evidence_ptr + 2) * kept + (judged - taken)
    expected_misses = tl.load(evidence_ptr + 3) * kept + (judged - expected)
    tl.store(evidence_ptr, hits)
    tl.store(evidence_ptr + 1, expected_hits)
    tl.store(evidence_ptr + 2, misses)
    tl.store(evidence_ptr + 3, expected_misses)

    split = tl.arange(0, BLOCK_SPLITS)
    keys = tl.load(keys_ptr + request * num_splits + split, mask=split < num_splits, other=NO_KEY)
    key = tl.max(keys, axis=0)
    length = tl.where(key >= 0, key >> 32, 0).to(tl.int32)
    copy_from = tl.where(key >= 0, (key & 0xFFFFFFFF) + 1, 0).to(tl.int32)
    inside = place < tl.where(length > 0, COPIES, 0)
    period = tl.maximum(size - copy_from, 1)
    copied = tl.load(text + copy_from + place % period, mask=inside, other=0)
    correction = (hits + STRENGTH) * (expected_misses + STRENGTH)
    correction /= (expected_hits + STRENGTH) * (misses + STRENGTH)
    odds = (length + place).to(tl.float32) / PRIOR * correction
    out = request * request_stride + place * depth_stride
    tl.store(copies_ptr + out, copied.to(tl.int64), mask=place < COPIES)
    tl.store(chances_ptr + out, tl.where(inside, odds / (1 + odds), 0.0), mask=place < COPIES)
    tl.store(last_ptr, size)
    tl.store(last_ptr + 1, tl.load(text + size - 2, mask=size >= 2, other=0))
    tl.store(last_ptr + 2, tl.load(text + size - 1, mask=size >= 1, other=0))
    tl.store(last_ptr + 3, length)
    tl.store(last_ptr + 4, copy_from)


def shipped() -> list[Shipped]:
    """Both kernels, for texts of 8k and 128k tokens."""
    signature = {"token_ids_ptr": "*i32", "num_tokens_ptr": "*i32", "slots_ptr": "*i32"}
    signature |= {"keys_ptr": "*i64", "row_stride": "i32"}
    outputs = {"last_ptr": "*i32", "evidence_ptr": "*fp32", "copies_ptr": "*i64"}
    outputs |= {"chances_ptr": "*fp32"}
    outputs |= dict.fromkeys(("request_stride", "depth_stride", "num_splits"), "i32")
    return [
        Shipped(
            name="scan",
            kernel=_scan,
            signature=signature,
            constexprs={"BLOCK": BLOCK, "MIN_MATCH": MIN_MATCH, "MAX_MATCH": MAX_MATCH},
            divisible=("row_stride",),
        ),
        *(
            Shipped(
                name=f"copy {splits} splits",
                kernel=_copy,
                signature={**signature, **outputs},
                constexprs={
                    "COPIES": MAX_COPIES,
                    "BLOCK_COPIES": triton.next_power_of_2(MAX_COPIES),
                    "BLOCK_SPLITS": splits,
                    "PRIOR": PRIOR,
                    "STRENGTH": STRENGTH,
                    "KEPT": KEPT,
                },
                num_warps=1,
                divisible=("row_stride",),
            )
            for splits in (8, MAX_SPLITS)
        ),
    ]


def _check(
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    evidence: torch.Tensor,
    keys: torch.Tensor,
    copies: torch.Tensor,
    chances: torch.Tensor,
) -> None:
    device, num_slots, requests = token_ids.device, len(token_ids), len(slots)
    check_device(_scan, device)
    check_tensor("token_ids", token_ids, [None, None], INT32, device, contiguous=False)
    for name, tensor, shape, dtypes in (
        ("num_tokens", num_tokens, [num_slots], INT32),
        ("slots", slots, [None], (*INT32, *INT64)),
        ("state.last", last, [num_slots, 5], INT32),
        ("state.evidence", evidence, [num_slots, 4], FP32),
        ("state.keys", keys, [num_slots, None], INT64),
    ):
        check_tensor(name, tensor, shape, dtypes, device)
    for name, tensor, dtypes in (("copies", copies, INT64), ("chances", chances, FP32)):
        check_tensor(name, tensor, [requests, MAX_COPIES], dtypes, device, packed=False)
    if chances.stride() != copies.stride():
        raise ValueError(
            f"chances has strides {list(chances.stride())}, expected those of copies, {list(copies.stride())}."
        )
    if requests > num_slots:
        raise ValueError(f"slots has {requests} requests, but there are {num_slots} slots.")

"""Copies of what followed a request's last tokens before: the twin of `find_copies_cpu` (find_copies_cpu.cpp)."""

from __future__ import annotations

import numpy as np
import torch

MIN_MATCH, MAX_MATCH = 2, 32  # tokens of a match
NONE = -1
STATE = INDEXED, LAST_PAIR, COPY_FROM = range(3)  # columns of a slot's state


def find_copies_cpu_naive(
    # [requests or more, longest text or more] int32, row b holds the text of request b
    token_ids: torch.Tensor,
    # [B] int64, tokens of each text
    num_tokens: torch.Tensor,
    # [B] int64, where each request's index is; no slot twice
    slots: torch.Tensor,
    # places that are compared with the text's end at most, the last ones first
    max_places: int,
    # [slots, a power of two] int32, in and out: the last place by hash of its pair of tokens
    head: torch.Tensor,
    # [slots, tokens] int32, in and out: the place before with the same hash
    previous: torch.Tensor,
    # [slots, 3] int32, in and out: tokens indexed, hash of the last pair of these, where the last copy came from;
    # zeros: an index of nothing
    state: torch.Tensor,
    # Outputs. [B, depth] int64, the copies; zeros without a match
    copies: torch.Tensor,
    # [B] int64, tokens of the match, 0 or 2 to 32
    length: torch.Tensor,
    # [B, 2] int32: tokens of the slot's last copy that the text took since, and 1 if it then took another one
    outcome: torch.Tensor,
) -> None:
    """Find the longest suffix of each text that occurred before, and copy the tokens after it.

    Of places that match equally long the last one counts. A copy that comes to the text's end goes on with its own
    tokens. A text that does not begin with what the slot has indexed is indexed anew: that is seen at its length and
    at the last two indexed tokens. Copies are of the text as it is, so an index that missed a change costs copies only.
    """
    buckets = head.shape[1]
    outcome.zero_()
    for b, (size, slot) in enumerate(zip(num_tokens.tolist(), slots.tolist(), strict=True)):
        text = token_ids[b, :size].numpy()
        # hash[i]: of the pair that ends at place i + 1
        hashes = _hash_pairs(text)
        indexed, last_pair, copy_from = state[slot].tolist()
        if 2 <= indexed <= size and hashes[indexed - 2].view(np.int32) == last_pair:
            if copy_from != NONE:
                known = min(copies.shape[1], size - indexed)
                same = text[copy_from : copy_from + known] == text[indexed : indexed + known]
                taken = int(np.cumprod(same).sum())
                outcome[b] = torch.tensor([taken, int(taken < known)])
        else:
            head[slot] = NONE
            indexed = 1
        bucket = hashes >> np.uint32(33 - buckets.bit_length())
        for place in range(indexed, size):
            previous[slot, place] = head[slot, bucket[place - 1]]
            head[slot, bucket[place - 1]] = place
        matched, copy_from = _longest_match(text, bucket, max_places)
        state[slot, INDEXED], state[slot, COPY_FROM] = size, copy_from
        if len(hashes):
            state[slot, LAST_PAIR] = int(hashes[-1].view(np.int32))
        length[b] = matched
        copied = text[copy_from:] if matched else np.zeros(1, dtype=np.int32)
        copies[b] = torch.from_numpy(np.resize(copied, copies.shape[1]))


def _hash_pairs(text: np.ndarray) -> np.ndarray:
    """`[size - 1]` uint32 hash of every two tokens in a row."""
    tokens = text.astype(np.uint32)
    mixed: np.ndarray = (tokens[:-1] * np.uint32(0x9E3779B1) + tokens[1:]) * np.uint32(0x85EBCA77)
    return mixed


def _longest_match(text: np.ndarray, bucket: np.ndarray, max_places: int) -> tuple[int, int]:
    """The length of the longest match, and where the tokens after it begin; 0 and NONE if there is none."""
    longest, copy_from = MIN_MATCH - 1, NONE
    places = 1 + np.flatnonzero(bucket[:-1] == bucket[-1:])
    for place in places[::-1][:max_places]:
        most = min(MAX_MATCH, int(place) + 1)
        before, last = text[place + 1 - most : place + 1][::-1], text[::-1][:most]
        matched = int(np.cumprod(before == last).sum())
        if matched > longest:
            longest, copy_from = matched, int(place) + 1
    return (longest, copy_from) if copy_from != NONE else (0, NONE)

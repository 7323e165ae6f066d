"""Copies of what followed a request's last tokens before: the twin of `find_copies_cpu` (find_copies_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from bita_kernels.copy_rules import MAX_MATCH, MIN_MATCH

NONE = -1
STATE = INDEXED, LAST_PAIR, COPY_FROM, TOKEN_BEFORE = range(4)  # columns of a slot's state


def find_copies_cpu_naive(
    # [requests or more, longest text or more] int32, row b holds the text of request b
    token_ids: torch.Tensor,
    # [B] int64, tokens of each text
    num_tokens: torch.Tensor,
    # [B] int64, where each request's index is; no slot twice
    slots: torch.Tensor,
    # places that are compared with the text's end at most, the last ones first
    max_places: int,
    # [slots, 2, a power of two] int32, in and out: the last place by hash of the pair of tokens that ends there, and by
    # that of its token alone
    head: torch.Tensor,
    # [slots, tokens] int32, in and out: the place before with the same hash
    previous: torch.Tensor,
    # [slots, 4] int32, in and out: tokens indexed, hash of the last pair of these, where the last copy came from, the
    # place before with the hash of the last token; zeros: an index of nothing
    state: torch.Tensor,
    # Outputs. [B, depth] int64, the copies; zeros without a match
    copies: torch.Tensor,
    # [B] int64, tokens of the match, 0 to 32
    length: torch.Tensor,
    # [B, 2] int32: tokens of the slot's last copy that the text took since, and 1 if it then took another one
    outcome: torch.Tensor,
) -> None:
    """Find the longest suffix of each text that occurred before, and copy the tokens after it.

    Of places that match equally long the last one counts. Where no pair matches, that is the last one with the hash of
    the last token, or none. A copy that comes to the text's end goes on with its own
    tokens. A text that does not begin with what the slot has indexed is indexed anew: that is seen at its length and
    at the last two indexed tokens. Copies are of the text as it is, so an index that missed a change costs copies only.
    """
    buckets = head.shape[2]
    outcome.zero_()
    for b, (size, slot) in enumerate(zip(num_tokens.tolist(), slots.tolist(), strict=True)):
        text = token_ids[b, :size].numpy()
        # hash[i]: of the pair that ends at place i + 1
        hashes = _hash_pairs(text)
        indexed, last_pair, copy_from, before = state[slot].tolist()
        if 2 <= indexed <= size and hashes[indexed - 2].view(np.int32) == last_pair:
            if copy_from != NONE:
                known = min(copies.shape[1], size - indexed)
                same = text[copy_from : copy_from + known] == text[indexed : indexed + known]
                taken = int(np.cumprod(same).sum())
                outcome[b] = torch.tensor([taken, int(taken < known)])
        else:
            head[slot] = NONE
            indexed, before = 0, NONE
        shift = np.uint32(33 - buckets.bit_length())
        pair, token = hashes >> shift, _hash_tokens(text) >> shift
        for place in range(indexed, size):
            before = int(head[slot, 1, token[place]])
            head[slot, 1, token[place]] = place
            previous[slot, place] = head[slot, 0, pair[place - 1]] if place else NONE
            if place:
                head[slot, 0, pair[place - 1]] = place
        places = 1 + np.flatnonzero(pair[:-1] == pair[-1:])
        matched, copy_from = longest_match(text, places[::-1][:max_places].tolist())
        if matched < 2:
            matched, copy_from = longest_match(text, [] if before == NONE else [before])
        state[slot] = torch.tensor([size, last_pair, copy_from, before])
        if len(hashes):
            state[slot, LAST_PAIR] = int(hashes[-1].view(np.int32))
        length[b] = matched
        copied = text[copy_from:] if matched else np.zeros(1, dtype=np.int32)
        copies[b] = torch.from_numpy(np.resize(copied, copies.shape[1]))


def _hash_pairs(text: np.ndarray) -> np.ndarray:
    """`[size - 1]` uint32 hash of every two tokens in a row."""
    last = text[1:].astype(np.uint32)
    mixed: np.ndarray = (_hash_tokens(text[:-1]) + last) * np.uint32(0x85EBCA77)
    return mixed


def _hash_tokens(text: np.ndarray) -> np.ndarray:
    """`[size]` uint32"""
    return text.astype(np.uint32) * np.uint32(0x9E3779B1)


def longest_match(
    # [tokens]
    text: np.ndarray,
    # ends of the matches that count, the first of equally long ones before the next
    places: Iterable[int],
) -> tuple[int, int]:
    """The length of the longest match, and where the tokens after it begin; 0 and NONE if there is none."""
    longest, copy_from = MIN_MATCH - 1, NONE
    for place in places:
        most = min(MAX_MATCH, place + 1)
        before, last = text[place + 1 - most : place + 1][::-1], text[::-1][:most]
        matched = int(np.cumprod(before == last).sum())
        if matched > longest:
            longest, copy_from = matched, place + 1
    return (longest, copy_from) if copy_from != NONE else (0, NONE)

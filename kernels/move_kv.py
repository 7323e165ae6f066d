"""Accepted rows to their linear KV slots, in all layers at once.

A block's row r lies in slot context_len + r. The walk accepted row path[d] at depth d; the next step
expects it in slot context_len + d. Source and target slots of a request may overlap: each program reads
all its rows before it writes one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import INT32, check_device, check_tensor, kind_of, remember
from .shipped import Shipped

# Words of a row that a program carries for every depth.
BLOCK_WORDS = 128
WORD_TYPES = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}

_checked: set[object] = set()


@dataclass(frozen=True)
class LayerCaches:
    """The KV caches of all layers that share a block table: one tensor of addresses for the kernel.

    Attributes:
        keys, values: one view `[num_blocks, block_size, Hkv, D]` a layer, any element type; they all have
            the same shape, strides and dtype. They keep the memory alive.
        addresses: `[2, L]` int64, of keys and values.
        word_size: bytes moved at once: the largest power of two up to 8 that all rows are aligned to.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    word_size: int

    @classmethod
    def of(cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> LayerCaches:
        """Collect the layers' caches, once, when they have been allocated.

        Raises:
            ValueError: layers that differ in shape, strides, dtype or device; heads that are not packed.
        """
        if not keys or len(keys) != len(values):
            raise ValueError(
                f"keys has {len(keys)} layers and values {len(values)}, expected the same number, at least 1."
            )
        first = keys[0]
        if first.dim() != 4 or first.stride(3) != 1:
            raise ValueError(
                f"keys[0] has shape {list(first.shape)} and strides {list(first.stride())}, expected "
                "[num_blocks, block_size, Hkv, D] with stride 1 in the last dimension."
            )
        for name, layers in (("keys", keys), ("values", values)):
            for layer, cache in enumerate(layers):
                for what in ("shape", "stride", "dtype", "device"):
                    got, want = (
                        tuple(t.stride()) if what == "stride" else getattr(t, what)
                        for t in (cache, first)
                    )
                    if got != want:
                        raise ValueError(
                            f"{name}[{layer}] has {what} {got}, expected {want} as in keys[0]: layers that "
                            "differ need a LayerCaches of their own."
                        )
        size = first.element_size()
        pointers = [[cache.data_ptr() for cache in layers] for layers in (keys, values)]
        alignment = math.gcd(
            8,
            *pointers[0],
            *pointers[1],
            *(size * n for n in (*first.stride()[:3], first.shape[3])),
        )
        addresses = torch.tensor(pointers, dtype=torch.int64).to(first.device)
        return cls(tuple(keys), tuple(values), addresses, alignment)

    def words(self, count: int) -> int:
        """Elements, as words."""
        return count * self.keys[0].element_size() // self.word_size


def move_kv(
    caches: LayerCaches,
    # [B, max blocks] int32
    block_table: torch.Tensor,
    # [B] int32, committed tokens before the root: the slot where the block begins
    context_len: torch.Tensor,
    # [B, max_depth + 1] int32, row in the block at each step of the walk, ascending
    path: torch.Tensor,
    # [B] int32, steps of the walk
    num_emitted: torch.Tensor,
) -> None:
    """Copy the keys and values of row path[d] to slot context_len + d, for d < num_emitted, in every layer.

    Slots of rows that are in their place are neither read nor written.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    kind = kind_of((caches.addresses, block_table, context_len, path, num_emitted))
    if kind not in _checked:
        _check(caches, block_table, context_len, path, num_emitted)
        remember(kind, _checked)
    num_requests, steps = path.shape
    if num_requests == 0:
        return
    cache = caches.keys[0]
    _, block_size, num_heads, head_size = cache.shape
    head_words = caches.words(head_size)
    grid = (num_requests, len(caches.keys), triton.cdiv(num_heads * head_words, BLOCK_WORDS))
    _move_kv_kernel[grid](
        caches.addresses,
        block_table,
        context_len,
        path,
        num_emitted,
        block_table.stride(0),
        caches.words(cache.stride(0)),
        caches.words(cache.stride(1)),
        caches.words(cache.stride(2)),
        num_heads * head_words,
        head_words,
        block_size,
        steps,
        WORD=WORD_TYPES[caches.word_size],
        BLOCK_STEPS=triton.next_power_of_2(steps),
        BLOCK_WORDS=BLOCK_WORDS,
    )


def move_kv_naive(
    caches: LayerCaches,
    block_table: torch.Tensor,
    context_len: torch.Tensor,
    path: torch.Tensor,
    num_emitted: torch.Tensor,
) -> None:
    """The specification of `move_kv`: the same arguments."""
    block_size = caches.keys[0].shape[1]
    for request in range(len(context_len)):
        start, emitted = int(context_len[request]), int(num_emitted[request])
        source = start + path[request, :emitted].long()
        target = start + torch.arange(emitted, device=path.device)
        moving = source != target
        (from_block, from_offset), (to_block, to_offset) = (
            (block_table[request, slots // block_size].long(), slots % block_size)
            for slots in (source[moving], target[moving])
        )
        for cache in (*caches.keys, *caches.values):
            cache[to_block, to_offset] = cache[from_block, from_offset]


@triton.jit
def _move_kv_kernel(
    addresses_ptr,
    block_table_ptr,
    context_len_ptr,
    path_ptr,
    num_emitted_ptr,
    block_table_stride,
    block_stride,
    slot_stride,
    head_stride,
    row_words,
    head_words,
    block_size,
    steps,
    WORD: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One program a request, layer and run of BLOCK_WORDS words of a row; no two share a word."""
    request = tl.program_id(0)
    layer = tl.program_id(1)
    step = tl.arange(0, BLOCK_STEPS)
    emitted = tl.load(num_emitted_ptr + request)
    row = tl.load(path_ptr + request * steps + step, mask=step < emitted, other=0)
    moving = (step < emitted) & (row != step)
    start = tl.load(context_len_ptr + request)

    table = block_table_ptr + request.to(tl.int64) * block_table_stride
    source = start + row
    target = start + step
    from_block = tl.load(table + source // block_size, mask=moving, other=0).to(tl.int64)
    to_block = tl.load(table + target // block_size, mask=moving, other=0).to(tl.int64)
    source = from_block * block_stride + (source % block_size).to(tl.int64) * slot_stride
    target = to_block * block_stride + (target % block_size).to(tl.int64) * slot_stride

    word = tl.program_id(2) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    in_row = (word // head_words).to(tl.int64) * head_stride + word % head_words
    mask = moving[:, None] & (word < row_words)[None, :]
    keys = tl.load(addresses_ptr + layer).to(tl.pointer_type(WORD))
    values = tl.load(addresses_ptr + tl.num_programs(1) + layer).to(tl.pointer_type(WORD))
    key = tl.load(keys + source[:, None] + in_row[None, :], mask=mask)
    value = tl.load(values + source[:, None] + in_row[None, :], mask=mask)
    # A target slot may be another row's source, read by another thread: all reads come first.
    tl.debug_barrier()
    tl.store(keys + target[:, None] + in_row[None, :], key, mask=mask)
    tl.store(values + target[:, None] + in_row[None, :], value, mask=mask)


def shipped() -> list[Shipped]:
    """Every word size at the paper's depth; the widest word also at depth 8."""
    names = ("addresses_ptr", "block_table_ptr", "context_len_ptr", "path_ptr", "num_emitted_ptr")
    integers = ("block_table_stride", "block_stride", "slot_stride", "head_stride", "row_words")
    signature = dict.fromkeys(names, "*i32") | {"addresses_ptr": "*i64"}
    signature |= dict.fromkeys((*integers, "head_words", "block_size", "steps"), "i32")
    return [
        Shipped(
            name=f"{size}-byte words depth {depth}",
            kernel=_move_kv_kernel,
            signature=signature,
            constexprs={
                "WORD": WORD_TYPES[size],
                "BLOCK_STEPS": triton.next_power_of_2(depth + 1),
                "BLOCK_WORDS": BLOCK_WORDS,
            },
        )
        for size, depth in ((8, 3), (8, 8), (4, 3), (2, 3), (1, 3))
    ]


def _check(
    caches: LayerCaches,
    block_table: torch.Tensor,
    context_len: torch.Tensor,
    path: torch.Tensor,
    num_emitted: torch.Tensor,
) -> None:
    device = caches.addresses.device
    check_device(_move_kv_kernel, device)
    check_tensor("context_len", context_len, [None], INT32, device)
    num_requests = len(context_len)
    check_tensor("num_emitted", num_emitted, [num_requests], INT32, device)
    check_tensor("path", path, [num_requests, None], INT32, device)
    check_tensor("block_table", block_table, [num_requests, None], INT32, device, contiguous=False)

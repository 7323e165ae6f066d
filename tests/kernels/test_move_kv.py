"""KV moves of all layers in one launch against a plain loop over requests, rows and layers."""

import numpy as np
import pytest
import torch
from bita_kernels.move_kv import LayerCaches, move_kv, move_kv_naive
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import int32

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]
LAYOUTS = ["NHD", "HND", "vllm"]


def make_caches(generator, layers, shape, dtype, layout):
    """Random bytes everywhere, NaN patterns among them: a byte that should not move and did, shows.

    NHD: slots before heads; HND: heads before slots; vllm: HND with K and V of a head in one row, as vLLM
    0.32 stores them (v1/attention/backends/triton_attn.py).
    """
    num_blocks, block_size, heads, head_size = shape
    size = torch.empty(0, dtype=dtype).element_size()

    def random(*dims):
        raw = generator.integers(0, 256, (*dims[:-1], dims[-1] * size), dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype)

    keys, values = [], []
    for _ in range(layers):
        if layout == "NHD":
            pair = random(num_blocks, 2, block_size, heads, head_size).unbind(1)
        elif layout == "HND":
            pair = random(num_blocks, 2, heads, block_size, head_size).transpose(2, 3).unbind(1)
        else:
            rows = random(num_blocks, heads, block_size, 2 * head_size).transpose(1, 2)
            pair = rows.split(head_size, dim=3)
        keys.append(pair[0])
        values.append(pair[1])
    return LayerCaches.of(keys, values)


def make_moves(generator, num_requests, steps, num_blocks, block_size):
    """Ascending paths as walks leave them, most of them overlapping; blocks that no two requests share."""
    context_len = generator.integers(0, 3 * block_size, num_requests)
    longest = steps + 4
    path = np.zeros((num_requests, steps), dtype=np.int64)
    num_emitted = generator.integers(0, steps + 1, num_requests)
    for request, emitted in enumerate(num_emitted):
        rows = 1 + np.sort(generator.permutation(longest - 1)[: max(emitted - 1, 0)])
        path[request, 1 : len(rows) + 1] = rows
    per_request = num_blocks // num_requests
    block_table = generator.permutation(num_blocks)[: num_requests * per_request]
    return {
        "block_table": int32(block_table.reshape(num_requests, per_request)),
        "context_len": int32(context_len),
        "path": int32(path),
        "num_emitted": int32(num_emitted),
    }


def raw(tensor):
    """Its bytes, to be compared as such."""
    return tensor.contiguous().view(torch.uint8)


def moved_by_hand(caches, block_table, context_len, path, num_emitted):
    """Bytes of every cache after the moves, row by row from a copy taken before."""
    block_size = caches.keys[0].shape[1]
    results = []
    for cache in (*caches.keys, *caches.values):
        before, after = raw(cache), raw(cache).clone()
        for request, emitted in enumerate(num_emitted.tolist()):
            start, table = int(context_len[request]), block_table[request].tolist()
            for place in range(emitted):
                source, target = start + int(path[request, place]), start + place
                after[table[target // block_size], target % block_size] = before[
                    table[source // block_size], source % block_size
                ]
        results.append(after)
    return results


@given(
    num_requests=st.integers(1, 3),
    layers=st.integers(1, 3),
    block_size=st.sampled_from([1, 3, 12, 16]),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([5, 8, 80]),
    steps=st.integers(2, 6),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_kernel_and_twin_move_accepted_rows_and_nothing_else(
    num_requests, layers, block_size, heads, head_size, steps, dtype, layout, seed
):
    per_request = 3 + -(-(steps + 4) // block_size)
    shape = (num_requests * per_request + 2, block_size, heads, head_size)
    for function in (move_kv, move_kv_naive):
        generator = np.random.default_rng(seed)
        caches = make_caches(generator, layers, shape, dtype, layout)
        moves = make_moves(generator, num_requests, steps, shape[0], block_size)
        want = moved_by_hand(caches, **moves)
        function(caches, **moves)
        for cache, expected in zip((*caches.keys, *caches.values), want, strict=True):
            assert torch.equal(raw(cache), expected), function.__name__


def test_a_target_that_is_a_later_source_is_read_first():
    """Path 0, 2, 3: row 2 goes to slot 1 and row 3 to slot 2, whose old content is the first move's."""
    keys = torch.arange(8.0).reshape(2, 4, 1, 1).repeat(1, 1, 2, 8)
    caches = LayerCaches.of([keys], [-keys])
    move_kv(caches, int32(np.array([[1, 0]])), int32(np.array([2])),
            int32(np.array([[0, 2, 3]])), int32(np.array([3])))  # fmt: skip
    # request's slots 0..7 lie in block 1, then block 0: slots 3 and 4 take those of 4 and 5
    assert caches.keys[0][1, :, 0, 0].tolist() == [4.0, 5.0, 6.0, 0.0]
    assert caches.keys[0][0, :, 0, 0].tolist() == [1.0, 1.0, 2.0, 3.0]
    assert torch.equal(caches.values[0], -caches.keys[0])


@pytest.mark.parametrize(
    ("dtype", "head_size", "word_size"),
    [(torch.bfloat16, 64, 8), (torch.float32, 5, 4), (torch.uint8, 80, 8), (torch.uint8, 5, 1), (torch.bfloat16, 5, 2)],
)  # fmt: skip
def test_words_are_as_wide_as_the_rows_are_aligned(dtype, head_size, word_size):
    cache = torch.zeros(2, 4, 3, head_size).to(dtype)
    assert LayerCaches.of([cache], [cache.clone()]).word_size == word_size


def test_layers_that_differ_are_refused():
    cache = torch.zeros(2, 4, 1, 8)
    with pytest.raises(
        ValueError, match=r"values\[0\] has dtype torch.bfloat16, expected torch.float32"
    ):
        LayerCaches.of([cache], [cache.bfloat16()])
    with pytest.raises(
        ValueError, match=r"keys\[1\] has shape torch.Size\(\[1, 4, 1, 8\]\), expected"
    ):
        LayerCaches.of([cache, cache[:1]], [cache, cache])
    with pytest.raises(ValueError, match="keys has 1 layers and values 2"):
        LayerCaches.of([cache], [cache, cache])
    with pytest.raises(ValueError, match="stride 1 in the last dimension"):
        LayerCaches.of([cache.transpose(2, 3)], [cache.transpose(2, 3)])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block_table", lambda t: t.long(), "block_table has dtype torch.int64, expected torch.int32"),
        ("block_table", lambda t: t[:1], r"block_table has shape \[1, 2\], expected \[2, any\]"),
        ("context_len", lambda t: t[None], r"context_len has shape \[1, 2\], expected \[any\]"),
        ("path", lambda t: t[:, ::2], r"path has strides \[3, 2\], expected a contiguous"),
        ("num_emitted", lambda t: t.to("meta"), "num_emitted is on meta, expected cpu"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_launch(name, change, message):
    keys = torch.arange(32.0).reshape(4, 4, 1, 2)
    caches = LayerCaches.of([keys], [keys.clone()])
    given_ = {
        "block_table": int32(np.array([[0, 1], [2, 3]])),
        "context_len": int32(np.array([1, 2])),
        "path": int32(np.array([[0, 2, 3], [0, 1, 3]])),
        "num_emitted": int32(np.array([3, 3])),
    }
    given_[name] = change(given_[name])
    with pytest.raises(ValueError, match=message):
        move_kv(caches, **given_)
    assert torch.equal(keys, torch.arange(32.0).reshape(4, 4, 1, 2))

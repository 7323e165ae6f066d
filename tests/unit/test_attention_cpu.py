"""Tree attention on CPU against dense attention in float64, over stock KV cache writes."""

import numpy as np
import pytest
import torch
from bita_kernels import cpu_kernels
from bita_kernels.move_kv_cpu_naive import move_kv_cpu_naive
from bita_kernels.tree_attention_cpu_naive import tree_attention_cpu_naive
from vllm import _custom_ops as ops

from bita_vllm.attention.cpu import TreeMetadata
from bita_vllm.step.host import NO_BLOCK, StepBlocks
from bita_vllm.tree import Template, TemplateTable

pytestmark = pytest.mark.usefixtures("two_threads")

HEADS_KV, GROUP, P = 2, 3, 5
SCALE = 0.2
TABLE = TemplateTable(Template.build([(0, 0), (0, 1), (1, 0), (3, 0), (2, 2)], {0: 3, 1: 1, 3: 2}))


def write(kv_cache, keys, values, slots, isa):
    """Stock cache write (ops.cpu_attn_reshape_and_cache)."""
    key_cache, value_cache = kv_cache.view(*kv_cache.shape[:2], -1, keys.shape[2]).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        key_cache,
        value_cache,
        slots,
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )


@pytest.fixture(params=["kernel", "twin"])
def tree_attention(request):
    if request.param == "twin":
        return tree_attention_cpu_naive
    assert cpu_kernels.register(), "it must be built here"
    return torch.ops.bita.tree_attention_cpu


@pytest.mark.parametrize(
    "softcap, window, has_sinks, chunk, num_prompt",
    [
        (0, -1, False, 0, P),
        (5.0, -1, False, 0, P),
        (0, 6, False, 0, P),
        (0, -1, True, 0, P),
        (5.0, 6, True, 0, P),
        (0, -1, False, 16, P),
        (0, -1, False, 0, 0),
        (5.0, 6, True, 0, 0),
    ],
    ids=[
        *("plain", "softcap", "window", "sinks", "sinks, softcap, window", "chunks"),
        *("no prompt tokens", "no prompt tokens, sinks, softcap, window"),
    ],
)
@pytest.mark.parametrize("isa, block_size, head_size", [("vec", 32, 64), ("vec16", 16, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_dense_attention(
    tree_attention,
    dtype,
    isa,
    block_size,
    head_size,
    softcap,
    window,
    has_sinks,
    chunk,
    num_prompt,
):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    lines = np.array([3, 0, NO_BLOCK, 3, 2, 3])
    context = np.array([0, 7, 11, 70, 33, 31])
    scheduled = np.where(lines >= 0, TABLE.num_rows[lines], 4)
    scheduled[5] -= 4  # cut by the scheduler
    blocks = StepBlocks.build(TABLE, lines, scheduled)
    num_kv_blocks = 120 // block_size + 1
    table = torch.from_numpy(generator.permutation(6 * num_kv_blocks).reshape(6, -1)).int()
    shape = 6 * num_kv_blocks, HEADS_KV, block_size, 2 * head_size
    kv_cache = torch.full(shape, float("nan"), dtype=dtype)
    prompt_keys = torch.randn(HEADS_KV, head_size, num_prompt)
    prompt_values = torch.randn(HEADS_KV, num_prompt, head_size)
    rows = int(scheduled.sum())
    query = torch.randn(rows, HEADS_KV * GROUP, head_size).to(dtype)
    total = context + scheduled
    keys = [torch.randn(n, HEADS_KV, head_size).to(dtype) for n in total]
    values = [torch.randn(n, HEADS_KV, head_size).to(dtype) for n in total]
    for i, n in enumerate(total):
        at = torch.arange(n)
        write(
            kv_cache,
            keys[i],
            values[i],
            table[i][at // block_size].long() * block_size + at % block_size,
            isa,
        )
    out = torch.full((rows, HEADS_KV * GROUP, head_size), float("nan"), dtype=dtype)

    tree = TreeMetadata(blocks, context, table)
    # One of them above all scores, one below.
    sinks = torch.tensor([9.0, -40, 0, 1, 2, -1]).to(dtype) if has_sinks else None
    prompt = prompt_keys, prompt_values
    tree_attention(
        query, kv_cache, *tree.arguments, *prompt, out, SCALE, softcap, window, sinks, chunk
    )

    assert not tree.all_rows_in_blocks
    start = 0
    for i, (line, n, c) in enumerate(zip(lines, scheduled, context, strict=True)):
        block_rows = out[start : start + n].double()
        if line == NO_BLOCK:
            assert block_rows.isnan().all()  # left to the stock kernel
        else:
            depth = TABLE.depth[line, :n]
            position = np.concatenate([np.arange(c), c + depth])
            for row in range(n):
                visible = np.concatenate([np.ones(c, bool), TABLE.ancestors[line, row, :n]])
                if window > 0:
                    visible &= (c + depth[row]) - position < window
                if chunk:  # a block's rows lie in two of them
                    visible &= (c + depth[row]) // chunk == position // chunk
                for head in range(HEADS_KV * GROUP):
                    kv_head = head // GROUP
                    k = keys[i][torch.from_numpy(visible), kv_head].double()
                    v = values[i][torch.from_numpy(visible), kv_head].double()
                    if TABLE.mask_index[line, row] >= 0:
                        k = torch.cat([prompt_keys[kv_head].T.double(), k])
                        v = torch.cat([prompt_values[kv_head].double(), v])
                    score = k @ query[start + row, head].double() * SCALE
                    if softcap:
                        score = torch.tanh(score / softcap) * softcap
                    if has_sinks:
                        score = torch.cat([score, sinks[head : head + 1].double()])
                    expected = score.softmax(0)[: len(v)] @ v
                    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                    torch.testing.assert_close(
                        block_rows[row, head], expected, atol=tolerance, rtol=tolerance
                    )
        start += n


def test_a_request_alone_gives_the_same_bits():
    cpu_kernels.register()
    generator = torch.Generator().manual_seed(0)
    lines, context = np.array([3, 2, 0, 3]), np.array([61, 7, 300, 0])
    blocks = StepBlocks.build(TABLE, lines, TABLE.num_rows[lines].astype(np.int64))
    kv_cache = torch.randn(48, HEADS_KV, 32, 128, generator=generator)
    table = torch.arange(48, dtype=torch.int32).view(4, 12)
    prompt = torch.randn(HEADS_KV, 64, P, generator=generator), torch.randn(HEADS_KV, P, 64)
    query = torch.randn(int(blocks.num_rows.sum()), HEADS_KV * GROUP, 64, generator=generator)

    def attend(rows, *arguments):
        out = torch.full_like(query[rows], float("nan"))
        torch.ops.bita.tree_attention_cpu(
            query[rows], kv_cache, *arguments, *prompt, out, SCALE, 0.0, -1
        )
        return out

    together = attend(slice(None), *TreeMetadata(blocks, context, table).arguments)
    for i in range(4):
        alone = StepBlocks.build(TABLE, lines[[i]], blocks.num_rows[[i]])
        rows = slice(int(blocks.first_row[i]), int(blocks.first_row[i] + blocks.num_rows[i]))
        arguments = TreeMetadata(alone, context[[i]], table[[i]]).arguments
        assert torch.equal(attend(rows, *arguments), together[rows])


@pytest.mark.parametrize("kind", ["kernel", "twin"])
@pytest.mark.parametrize("isa, block_size, head_size", [("vec", 32, 64), ("vec16", 16, 80)])
def test_moved_rows_read_as_if_written_there(kind, isa, block_size, head_size):
    assert cpu_kernels.register(), "it must be built here"
    move = torch.ops.bita.move_kv_cpu if kind == "kernel" else move_kv_cpu_naive
    torch.manual_seed(0)
    layers = [torch.zeros(4, HEADS_KV, block_size, 2 * head_size) for _ in range(3)]
    expected = [torch.zeros_like(layer) for layer in layers]
    source, target = (
        torch.tensor([5, 9, block_size + 3]),
        torch.tensor([4, 5, block_size - 1]),
    )  # overlapping
    for layer, wanted in zip(layers, expected, strict=True):
        rows = torch.randn(2 * block_size, HEADS_KV, head_size)
        slots = torch.arange(2 * block_size)
        write(layer, rows, rows + 1, slots, isa)
        moved = rows.clone()
        moved[target] = rows[source]
        write(wanted, moved, moved + 1, slots, isa)
    move(layers, source, target)
    for layer, wanted in zip(layers, expected, strict=True):
        assert torch.equal(layer, wanted)

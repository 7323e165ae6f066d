"""The next blocks on the device against those of the CPU runner (`NextBlocks.fill`), and against the naive twin."""

import numpy as np
import pytest
import torch
from bita_kernels import build_block as module
from bita_kernels.build_block import (
    PADDING_TOKEN,
    build_block,
    build_block_naive,
    workspace_shape,
)
from bita_kernels.tree_table import TreeTable
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import int32, templates

from bita_vllm.runner.blocks import NextBlocks
from bita_vllm.tree import Template, TemplateTable

POISON = -7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 16 tokens: small vocabularies take several."""
    monkeypatch.setattr(module, "CHUNK", 16)


def distinct_logits(generator, num_rows, vocab_size, dtype):
    """Rows of distinct finite values of that dtype, both signs, in random order."""
    values = torch.arange(vocab_size, dtype=torch.float32) - vocab_size // 2
    order = np.stack([generator.permutation(vocab_size) for _ in range(num_rows)])
    return values[torch.from_numpy(order)].to(dtype)


def arguments(table, logits, logits_rows, line, token_dtype=torch.int64):
    """Inputs; a workspace and an output full of poison."""
    device_table = TreeTable.of(table, "cpu")
    shape = workspace_shape(len(line), logits.shape[1], device_table)
    return {
        "logits": logits,
        "logits_rows": int32(logits_rows),
        "line": int32(line),
        "first_mask_id": 1000,
        "table": device_table,
        "workspace": torch.full(shape, 2**63 - 1),
        "draft_tokens": torch.full(
            (len(line), device_table.num_rows - 1), POISON, dtype=token_dtype
        ),
    }


@given(
    template=templates(),
    num_requests=st.integers(1, 3),
    vocab_size=st.integers(6, 40),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    token_dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=80, deadline=None)
def test_blocks_equal_those_of_the_cpu_runner(
    template, num_requests, vocab_size, seed, dtype, token_dtype
):
    generator = np.random.default_rng(seed)
    table = TemplateTable(template)
    line = generator.integers(0, template.max_depth + 1, num_requests)
    logits = distinct_logits(generator, 9, vocab_size, dtype)
    has = np.arange(template.max_depth) < line[:, None]
    logits_rows = np.where(has, generator.integers(0, 9, has.shape), 10**6)
    best = logits[logits_rows[has]].float().topk(template.max_rank).indices.numpy()
    upcoming = NextBlocks(depths=line, mask_rows=np.where(has, logits_rows, -1))
    want = [
        block + [PADDING_TOKEN] * (template.num_rows - 1 - len(block))
        for block in upcoming.fill(table, line, best, 1000)
    ]
    for function in (build_block, build_block_naive):
        given_ = arguments(table, logits, logits_rows, line, token_dtype)
        function(**given_)
        assert given_["draft_tokens"].tolist() == want, function.__name__


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-7]


@given(
    row=st.lists(st.sampled_from(SPECIAL), min_size=6, max_size=40),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_equal_logits_go_to_the_lower_id_and_nan_is_the_greatest(row, dtype):
    table = TemplateTable(Template.from_widths([6], 1))
    logits = torch.tensor([row]).to(dtype)
    given_ = arguments(table, logits, np.array([[0]]), np.array([1]))
    build_block(**given_)
    got = given_["draft_tokens"][0, :6].tolist()

    def order(token):
        value = float(logits[0, token])
        return (value == value, -value if value == value else 0.0, token)

    assert got == sorted(range(len(row)), key=order)[:6]
    build_block_naive(**given_)
    assert given_["draft_tokens"][0, :6].tolist() == got
    # torch.topk: the same values; which of equal ones it returns is its own affair
    values = logits[0][got].nan_to_num(nan=9e9)
    assert torch.equal(values, logits.topk(6).values[0].nan_to_num(nan=9e9))


def test_a_chunk_of_real_size_and_sixteen_ranks(monkeypatch):
    monkeypatch.undo()
    table = TemplateTable(Template.from_widths([16, 2], 2))
    logits = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0))
    given_ = arguments(table, logits, np.array([[1, 0]]), np.array([2]))
    assert given_["workspace"].shape == (2, 3, 16)
    build_block(**given_)
    got = given_["draft_tokens"][0].tolist()
    best = logits.topk(16).indices
    depth, rank = table.depth[2], table.rank[2]
    nodes = range(1, int(table.num_nodes[2]))
    assert [got[row - 1] for row in nodes] == [
        int(best[1 if depth[row] == 1 else 0, rank[row]]) for row in nodes
    ]


def test_logits_rows_may_be_strided():
    table = TemplateTable(Template.from_widths([3], 1))
    wide = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    given_ = arguments(table, wide[:, :50], np.array([[3]]), np.array([1]))
    build_block(**given_)
    assert given_["draft_tokens"][0, :3].tolist() == wide[3, :50].topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", lambda t: t.double(), "logits has dtype torch.float64, expected torch.float32 or"),
        ("logits", lambda t: t.T.contiguous().T, r"logits has strides \[1, 4\], expected 1 in the last"),
        ("logits", lambda t: t[:, :2], "logits has 2 tokens, expected at least 3"),
        ("line", lambda t: t.long(), "line has dtype torch.int64, expected torch.int32"),
        ("logits_rows", lambda t: t[:, :1], r"logits_rows has shape \[2, 1\], expected \[2, 2\]"),
        ("workspace", lambda t: t[:-1], r"workspace has shape \[3, 2, 3\], expected \[4, 2, 3\]"),
        ("draft_tokens", lambda t: t.float(), "draft_tokens has dtype torch.float32, expected torch.int32"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_launch(name, change, message):
    table = TemplateTable(Template.from_widths([3, 2], 2))
    given_ = arguments(table, torch.zeros(4, 20), np.zeros((2, 2)), np.array([2, 1]))
    changed = {**given_, name: change(given_[name])}
    with pytest.raises(ValueError, match=message):
        build_block(**changed)
    assert (given_["draft_tokens"] == POISON).all()


def test_more_than_sixteen_ranks_are_refused():
    table = TemplateTable(Template.from_widths([17], 1))
    given_ = arguments(table, torch.zeros(1, 20), np.zeros((1, 1)), np.array([1]))
    with pytest.raises(ValueError, match="table uses 17 ranks, expected at most 16"):
        build_block(**given_)

"""The layout of a step: mask rows found in fixed shapes, one pass over the output head where rows are few."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bita_kernels.accept_tree import accept_tree_naive
from bita_kernels.begin_step import begin_step_naive

from bita_vllm.runner import gpu_logits
from bita_vllm.runner.gpu_logits import parts_of, rows_in_one_pass
from bita_vllm.step import device as gpu_trees
from bita_vllm.step.device import StepTrees
from bita_vllm.step.mask_rows import MaskRows
from bita_vllm.system.machine import DeviceSpeed
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table

MAX_REQUESTS = 5


@pytest.fixture
def trees(monkeypatch) -> StepTrees:
    monkeypatch.setattr(gpu_trees, "begin_step", begin_step_naive)
    ladder = Ladder.fixed(Template.from_widths([2, 1], 3))
    trees = StepTrees(ladder, acceptance_table(None, 3), MAX_REQUESTS, torch.device("cpu"))
    trees.lora_rows = MaskRows(MAX_REQUESTS * trees.table.num_rows + 1, torch.device("cpu"))
    trees.expect_blocks(SimpleNamespace(idx_mapping_np=np.arange(MAX_REQUESTS)), 0)
    return trees


def begin(trees: StepTrees, line: list[int], num_rows: list[int]) -> None:
    """A step of requests with these lines, -1 for none, and rows."""
    n = sum(rows > 0 for rows in num_rows)
    rows = torch.tensor([0, *num_rows[:n]])
    logits = torch.tensor(
        [0, *(r if at >= 0 else 1 for at, r in zip(line, num_rows[:n], strict=False))]
    )
    trees.line_of_slot[:n] = torch.tensor(line[:n]).clamp(min=0)
    drafts = (logits[1:] - 1).numpy()
    batch = SimpleNamespace(
        num_reqs=n,
        num_draft_tokens=int(drafts.sum()),
        num_draft_tokens_per_req=drafts,
        idx_mapping=torch.arange(n),
        idx_mapping_np=np.arange(n),
        query_start_loc=rows.cumsum(0).int(),
        cu_num_logits=logits.cumsum(0).int(),
        input_ids=torch.zeros(sum(num_rows), dtype=torch.int32),
        positions=torch.arange(sum(num_rows)),
    )
    trees.begin(batch, ())


def expected(trees: StepTrees) -> list[int]:
    """Row by row, from the table."""
    found = []
    for line, first, num in zip(trees.line, trees.first_row, trees.num_rows, strict=True):
        if line >= 0:
            is_mask = trees.table.mask_index[line, : int(num)] >= 0
            found += (int(first) + is_mask.nonzero().flatten()).tolist()
    return found


@pytest.mark.parametrize(
    ("line", "num_rows"),
    [
        ([2, -1, 2, 0, -1], [16, 9, 16, 16, 0]),  # a prefill chunk between blocks, a short line
        ([1, 2, -1, -1, -1], [16, 7, 1, 0, 0]),  # a block that was cut
        ([2, 2, -1, -1, -1], [16, 3, 0, 0, 0]),  # cut before its first mask
        ([-1] * MAX_REQUESTS, [4, 1, 0, 0, 0]),
        ([2] * MAX_REQUESTS, [16] * MAX_REQUESTS),
    ],
    ids=["mixed", "cut", "no masks left", "no blocks", "full"],
)
def test_mask_rows_lie_in_front_and_are_counted(trees, line, num_rows):
    begin(trees, [2, 2], [16, 16])  # an earlier step
    trees.lora_rows.rows.fill_(77)
    begin(trees, line, num_rows)
    assert trees.line.tolist() == [
        at if rows else -1 for at, rows in zip(line, num_rows, strict=True)
    ]
    want = expected(trees)
    assert int(trees.lora_rows.num) == len(want)
    assert trees.lora_rows.rows[: len(want)].tolist() == want


def test_a_slot_that_never_had_a_block_may_begin_with_one(trees, monkeypatch):
    """vLLM pads a request whose prompt is cached but for its last token; its drafts are those of an unused slot."""
    monkeypatch.setattr(gpu_trees, "accept_tree", accept_tree_naive)
    ladder = Ladder.fixed(Template.from_widths([2, 1], 3))
    fresh = StepTrees(ladder, acceptance_table(None, 3), MAX_REQUESTS, torch.device("cpu"))
    begin(fresh, [0], [16])
    tokens = torch.empty(1, fresh.table.max_depth + 3, dtype=torch.int64)
    targets, emitted = torch.full((fresh.num_nodes,), 5), torch.empty(1, dtype=torch.int32)
    batch = SimpleNamespace(input_ids=torch.zeros(16, dtype=torch.int32))
    fresh.walk(targets, slice(0, 1), batch, tokens, emitted)
    assert tokens[0].tolist()[:2] == [5, -1] and emitted.tolist() == [1]


def test_mask_rows_get_logits_with_the_nodes_up_to_the_limit(trees):
    template = Template.from_widths([2, 1], 3)
    nodes, masks = template.num_nodes, template.num_rows - template.num_nodes
    trees.rows_in_one_pass = 2 * (nodes + masks)
    begin(trees, [2, 2], [16, 16])
    assert (trees.num_nodes, trees.num_masks) == (nodes, masks)
    rows = trees.rows_of(slice(0, 2))
    assert sorted(rows.tolist()) == list(range(2 * (nodes + masks)))
    assert trees.first_mask[:2].tolist() == [2 * nodes, 2 * nodes + masks]

    begin(trees, [2, 2, 2], [16, 16, 16])
    assert (trees.num_nodes, trees.num_masks) == (nodes, 0)
    assert trees.rows_of(slice(1, 3)).tolist() == [
        16 * request + node for request in (1, 2) for node in range(nodes)
    ]
    assert trees.first_mask[:3].tolist() == [nodes, 16 + nodes, 32 + nodes]


def test_few_rows_take_one_pass_and_fewer_where_ranks_share_the_head(monkeypatch):
    assert rows_in_one_pass(1, 32_000) == gpu_logits.MAX_ROWS_IN_ONE_PASS
    assert rows_in_one_pass(4, 32_000) == gpu_logits.MAX_ROWS_IN_ONE_PASS // 4
    h100, a100 = DeviceSpeed(3.0e12, 640e12), DeviceSpeed(1.84e12, 187e12)
    assert rows_in_one_pass(1, 32_000, h100) >= 256 > 2 * rows_in_one_pass(2, 32_000, h100) - 16
    assert rows_in_one_pass(1, 32_000, a100) == int(1.25 * a100.knee)
    monkeypatch.setattr(gpu_logits, "get_max_chunk_logits", lambda vocab_size: 13)
    assert rows_in_one_pass(1, 32_000) == 13, "one pass is one part"


@pytest.mark.parametrize("tile", [1, 64, 128])
@pytest.mark.parametrize("knee", [48, 100, 110, 150, 213, 300])
def test_one_pass_takes_no_longer_than_two(knee, tile):
    """In the roofline, with rows in whole tiles; two passes have half of the rows each, which is kind to them."""

    def seconds(rows):
        return max(1.0, tile * -(-rows // tile) / knee)

    for rows in range(2, rows_in_one_pass(1, 32_000, DeviceSpeed(1e12, knee * 1e12)) + 1):
        assert seconds(rows) <= 2 * seconds(rows // 2 + rows % 2), rows


def test_parts_begin_where_buffers_are_aligned(monkeypatch):
    monkeypatch.setattr(gpu_logits, "get_max_chunk_logits", lambda vocab_size: 100)
    assert [part.start for part in parts_of(30, 9, 1000)] == [0, 8, 16, 24]
    assert parts_of(30, 9, 1000)[-1].stop == 30
    assert [part.start for part in parts_of(5, 40, 1000)] == [0, 2, 4]

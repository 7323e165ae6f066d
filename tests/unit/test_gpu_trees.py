"""The mask rows of a step, found on the device in fixed shapes."""

import pytest
import torch

from bita_vllm.runner.gpu_trees import StepTrees
from bita_vllm.runner.mask_lora import MaskRows
from bita_vllm.template_set import TemplateSet
from bita_vllm.tree import Template
from bita_vllm.tree_search import acceptance_table

MAX_REQUESTS = 5


@pytest.fixture
def trees() -> StepTrees:
    templates = TemplateSet((Template.from_widths([2, 1], 3),))
    trees = StepTrees([templates], acceptance_table(None, 3), MAX_REQUESTS, torch.device("cpu"))
    trees.lora_rows = MaskRows(MAX_REQUESTS * trees.table.num_rows + 1, torch.device("cpu"))
    return trees


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
    trees.line.copy_(torch.tensor(line))
    trees.num_rows.copy_(torch.tensor(num_rows))
    trees.first_row.copy_(torch.tensor(num_rows).cumsum(0) - torch.tensor(num_rows))
    trees.lora_rows.rows.fill_(77)  # of an earlier step
    trees._find_mask_rows(trees.lora_rows)
    want = expected(trees)
    assert int(trees.lora_rows.num) == len(want)
    assert trees.lora_rows.rows[: len(want)].tolist() == want

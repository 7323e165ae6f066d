"""Draft metrics count the depths that a block offered."""

import numpy as np
import pytest

from bita_vllm.scheduling.scheduler import depth_of_line, depth_offered
from bita_vllm.tree import Template, TemplateTable

TEMPLATE = Template.from_widths([3, 2], 3)  # 6 nodes, the chain of two first; 24 rows
TABLE = TemplateTable(TEMPLATE)
LADDER = TemplateTable(TEMPLATE, Template.from_widths([5, 4, 3], 3))


@pytest.mark.parametrize(
    ("line", "drafts", "depth"),
    [
        (0, 23, 0),  # padded to R, without candidates
        (0, 1, 0),
        (1, 23, 1),
        (2, 1, 1),  # cut after its first node
        (2, 2, 2),
        (2, 23, 2),
        (5, 23, 2),  # of the next template: its depths 0 to 3 are lines 3 to 6
        (6, 51, 3),
    ],
)
def test_depth_that_a_padded_block_offers(line, drafts, depth):
    assert depth_of_line(LADDER)[line, drafts] == depth


def test_length_tells_the_depth_of_an_unpadded_block():
    offered = depth_offered(TABLE)
    assert offered[TABLE.num_rows - 1].tolist() == [0, 1, 2]
    assert np.array_equal(depth_of_line(TABLE)[2, 1:3], offered[1:3])

"""The walk one depth at a time against the walk of the CPU runner (`StepBlocks`), and against the naive twin."""

import numpy as np
import pytest
import torch
from bita_kernels.extend_paths import Chains, extend_paths, extend_paths_naive
from bita_kernels.tree_table import TreeTable
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import Step, int32, templates

from bita_vllm.tree import Template, TemplateTable

POISON = -7
FUNCTIONS = [extend_paths, extend_paths_naive]


def arguments(step, table):
    """Inputs, N nodes to each request; chains full of poison."""
    blocks, nodes = step.blocks, table.max_nodes
    num_requests = len(blocks.line)
    own = np.minimum(np.arange(nodes), blocks.num_nodes[:, None] - 1)
    generator = np.random.default_rng(0)
    device_table = TreeTable.of(table, "cpu")
    chains = Chains.empty(num_requests, nodes, device_table)
    for tensor in vars(chains).values():
        tensor.fill_(POISON)
    return {
        "line": int32(blocks.line),
        "num_rows": int32(blocks.num_rows),
        "node_tokens": int32(step.row_tokens[blocks.first_row[:, None] + own].flatten()),
        "node_positions": torch.from_numpy(generator.integers(0, 900, num_requests * nodes)),
        "slots": torch.from_numpy(generator.permutation(num_requests)),
        "table": device_table,
        "chains": chains,
    }


@given(template=templates(), num_requests=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_kernel_and_twin_take_the_cpu_runners_path(template, num_requests, seed):
    table = TemplateTable(template)
    step = Step.random(table, num_requests, seed)
    blocks, nodes = step.blocks, table.max_nodes
    walk = blocks.walk(
        step.row_tokens[blocks.node_rows()],
        lambda at, *_: step.targets[at],
        np.ones(num_requests, dtype=bool),
    )
    own = np.minimum(np.arange(nodes), blocks.num_nodes[:, None] - 1)
    targets = torch.from_numpy(step.targets[blocks.first_node[:, None] + own]).flatten()
    for function in FUNCTIONS:
        given_ = arguments(step, table)
        chains, sampled = given_["chains"], None
        for length in range(table.max_depth + 2):
            function(sampled, length, **given_)
            if length > table.max_depth:
                break
            steps = length + 1
            taken = np.where(np.arange(steps) < walk.num_emitted[:, None], walk.path[:, :steps], 0)
            taken = np.maximum.accumulate(taken, axis=1)  # where a walk stops, it stays
            rows = chains.rows[: num_requests * steps]
            want = torch.from_numpy(np.arange(num_requests)[:, None] * nodes + taken).flatten()
            assert rows.tolist() == want.tolist(), function.__name__
            assert torch.equal(chains.tokens[: len(rows)], given_["node_tokens"][rows])
            assert torch.equal(chains.positions[: len(rows)], given_["node_positions"][rows])
            assert torch.equal(chains.slots[: len(rows)], given_["slots"].repeat_interleave(steps))
            assert chains.local[: len(rows)].tolist() == list(range(steps)) * num_requests
            sampled = targets[rows]
        expected = np.full((num_requests, nodes), -1)
        for request, (path, emitted) in enumerate(zip(walk.path, walk.num_emitted, strict=True)):
            for node, token in zip(path[:emitted], walk.tokens[request], strict=False):
                expected[request, node] = token
        assert chains.targets.tolist() == expected.flatten().tolist(), function.__name__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1}, "length is 1, expected 0 at the beginning"),
        ({"sampled": torch.zeros(4, dtype=torch.int64), "length": 9}, "length is 9, expected"),
        ({"sampled": torch.zeros(3, dtype=torch.int64), "length": 1}, r"sampled has shape \[3\]"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, "slots has dtype torch.int32"),
        ({"node_tokens": torch.zeros(6, dtype=torch.int32)}, "node_tokens has 6 places for 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_launch(change, message):
    table = TemplateTable(Template.from_widths([2, 2], 2))
    given_ = arguments(Step.random(table, 4, seed=0), table)
    with pytest.raises(ValueError, match=message):
        extend_paths(**{"sampled": None, "length": 0, **given_, **change})
    assert (given_["chains"].path == POISON).all()

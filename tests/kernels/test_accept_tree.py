"""The walk on the device against the walk of the CPU runner (`StepBlocks`), and against the naive twin."""

import numpy as np
import pytest
import torch
from bita_kernels.accept_tree import accept_tree, accept_tree_naive
from bita_kernels.checks import check_device
from bita_kernels.tree_table import TreeTable
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import Step, int32, templates
from triton.runtime.jit import JITFunction

from bita_vllm.tree import Template, TemplateTable

POISON = -7
OUTPUTS = ("tokens", "path", "num_emitted", "next_depths", "mask_rows")


def arguments(step, table, token_dtype=torch.int64, target_of_every_row=False):
    """Inputs of the step; outputs full of poison."""
    blocks, num_requests = step.blocks, len(step.blocks.line)
    depth = table.template.max_depth
    targets, first_target = step.targets, blocks.first_node
    if target_of_every_row:
        targets = np.full(len(step.row_tokens), POISON)
        targets[blocks.node_rows()] = step.targets
        first_target = blocks.first_row
    return {
        "target_tokens": torch.from_numpy(targets).to(token_dtype),
        "row_tokens": torch.from_numpy(step.row_tokens).to(token_dtype),
        "first_target": int32(first_target),
        "first_row": int32(blocks.first_row),
        "num_rows": int32(blocks.num_rows),
        "line": int32(blocks.line),
        "emitting": torch.from_numpy(step.emitting),
        "first_mask": int32(first_mask_rows(blocks)),
        "table": TreeTable.of(table, "cpu"),
        "tokens": torch.full((num_requests, depth + 3), POISON, dtype=token_dtype),
        "path": torch.full((num_requests, depth + 1), POISON, dtype=torch.int32),
        "num_emitted": torch.full((num_requests,), POISON, dtype=torch.int32),
        "next_depths": torch.full((num_requests,), POISON, dtype=torch.int32),
        "mask_rows": torch.full((num_requests, depth), POISON, dtype=token_dtype),
    }


def first_mask_rows(blocks):
    """Row of the step after each block's last node."""
    return blocks.first_row + np.where(blocks.line >= 0, blocks.table.num_nodes[blocks.line], 1)


def expected(step):
    """What the CPU runner finds."""
    walk = step.blocks.walk(
        step.row_tokens[step.blocks.node_rows()],
        lambda nodes, *_: step.targets[nodes],
        step.emitting,
    )
    masks = step.blocks.chosen_masks(walk, step.blocks.table.max_depth)
    return {
        "tokens": np.column_stack([walk.tokens, step.blocks.line, walk.last_node]),
        "path": walk.path,
        "num_emitted": walk.num_emitted,
        "next_depths": masks.depths,
        "mask_rows": masks.rows,
    }


@given(
    template=templates(),
    num_requests=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    token_dtype=st.sampled_from([torch.int32, torch.int64]),
    target_of_every_row=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_kernel_and_twin_walk_as_the_cpu_runner_does(
    template, num_requests, seed, token_dtype, target_of_every_row
):
    table = TemplateTable(template)
    step = Step.random(table, num_requests, seed)
    want = expected(step)
    for function in (accept_tree, accept_tree_naive):
        given_ = arguments(step, table, token_dtype, target_of_every_row)
        function(**given_)
        for name in OUTPUTS:
            assert given_[name].tolist() == want[name].tolist(), (function.__name__, name)


def test_a_request_is_the_same_alone_and_in_company():
    table = TemplateTable(Template.from_widths([5, 4, 3], 3))
    step = Step.random(table, 12, seed=1)
    together = arguments(step, table)
    accept_tree(**together)
    for request in range(12):
        alone = arguments(step, table)
        inputs = ("first_target", "first_row", "num_rows", "line", "emitting", "first_mask")
        for name in (*inputs, *OUTPUTS):
            alone[name] = alone[name][request : request + 1].contiguous()
        accept_tree(**alone)
        assert all(torch.equal(alone[name][0], together[name][request]) for name in OUTPUTS)


@pytest.mark.parametrize("function", [accept_tree, accept_tree_naive])
def test_a_request_without_rows_emits_nothing(function):
    table = TemplateTable(Template.from_widths([2, 2], 2))
    given_ = arguments(Step.random(table, 2, seed=0), table)
    given_["emitting"][:] = True
    given_["num_rows"][:] = 0
    function(**given_)
    assert given_["num_emitted"].tolist() == [0, 0]
    assert given_["next_depths"].tolist() == [0, 0]
    assert (given_["tokens"][:, :-2] == -1).all() and (given_["mask_rows"] == -1).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("row_tokens", lambda t: t.float(), r"row_tokens has dtype torch.float32, expected torch.int32 or"),
        ("line", lambda t: t.long(), "line has dtype torch.int64, expected torch.int32"),
        ("first_row", lambda t: t[:-1], r"first_row has shape \[3\], expected \[4\]"),
        ("tokens", lambda t: t[:, 1:].contiguous(), r"tokens has shape \[4, 4\], expected \[4, 5\]"),
        ("path", lambda t: t.T.contiguous().T, r"path has strides \[1, 4\], expected a contiguous"),
        ("mask_rows", lambda t: t.to("meta"), "mask_rows is on meta, expected cpu"),
        ("emitting", lambda t: t[None], r"emitting has shape \[1, 4\], expected \[4\]"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_launch(name, change, message):
    table = TemplateTable(Template.from_widths([2, 2], 2))
    given_ = arguments(Step.random(table, 4, seed=0), table)
    changed = {**given_, name: change(given_[name])}
    with pytest.raises(ValueError, match=message):
        accept_tree(**changed)
    assert all((given_[output] == POISON).all() for output in OUTPUTS)


@pytest.mark.parametrize("function", [accept_tree, accept_tree_naive])
def test_mask_rows_may_be_counted_elsewhere(function):
    """Among the logits of a step, say: 100 for the first mask row of the second block."""
    table = TemplateTable(Template.from_widths([2, 2], 2))
    here = arguments(Step.random(table, 6, seed=2), table)
    there = {k: v.clone() if torch.is_tensor(v) else v for k, v in here.items()}
    there["first_mask"] = torch.arange(6, dtype=torch.int32) * 100
    function(**here)
    function(**there)
    has = here["mask_rows"] >= 0
    assert has.any()
    moved = here["mask_rows"] + (there["first_mask"] - here["first_mask"])[:, None]
    assert torch.equal(there["mask_rows"], torch.where(has, moved, -1))


def test_a_table_without_draft_nodes_is_refused():
    with pytest.raises(ValueError, match="no draft nodes"):
        TreeTable.of(TemplateTable(Template.build([], {0: 2})), "cpu")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    def kernel():
        pass

    with pytest.raises(ValueError, match=r"on cpu, expected a CUDA device.* use the naive twin"):
        check_device(JITFunction(kernel), torch.device("cpu"))

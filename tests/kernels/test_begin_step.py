"""The layout of a step on the device against the CPU runner's (`StepBlocks`), and against the naive twin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bita_kernels import begin_step as module
from bita_kernels import checks
from bita_kernels.begin_step import begin_step, begin_step_naive
from bita_kernels.tree_table import TreeTable
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import Step, int32, templates

from bita_vllm.step.host import StepBlocks
from bita_vllm.tree import Template, TemplateTable

POISON = -7
SPARE = 3  # places after the last request
OUTPUTS = ("line", "first_row", "num_rows", "context_len", "first_mask", "logits_rows")
OUTPUTS += ("node_tokens", "node_positions", "node_slots", "mask_rows", "num_mask_rows")
FUNCTIONS = [begin_step, begin_step_naive]


def arguments(blocks, table, seed=0, with_masks=True, finds_masks=True):
    """Inputs as vLLM has them before a forward pass; outputs full of poison."""
    generator = np.random.default_rng(seed)
    num_requests, ends = len(blocks.line), np.cumsum(blocks.num_rows)
    context = generator.integers(0, 500, num_requests)
    starts = ends - blocks.num_rows
    linear = np.concatenate(
        [c + np.arange(n) for c, n in zip(context, blocks.num_rows, strict=True)]
    )
    slots = generator.permutation(num_requests + SPARE)[:num_requests]
    line_of_slot = np.full(num_requests + SPARE, 0)
    line_of_slot[slots] = np.maximum(blocks.line, 0)
    num_logits = np.where(blocks.line >= 0, np.maximum(blocks.num_rows, 2), 1)
    device_table = TreeTable.of(table, "cpu")
    num_masks = int(device_table.num_masks.max()) if with_masks else 0
    room = num_requests * (table.max_nodes + num_masks)

    def poison(size, dtype=torch.int32):
        return torch.full((size,), POISON, dtype=dtype)

    return {
        "query_start": int32(np.append(starts, ends[-1])),
        "cu_num_logits": int32(np.append(0, np.cumsum(num_logits))),
        "slots": torch.from_numpy(slots),
        "line_of_slot": int32(line_of_slot),
        "input_ids": int32(generator.integers(0, 500, ends[-1])),
        "positions": torch.from_numpy(linear),
        "table": device_table,
        "num_nodes": table.max_nodes,
        "num_masks": num_masks,
        **{name: poison(num_requests + SPARE) for name in OUTPUTS[:5]},
        "logits_rows": poison(room, torch.int64),
        "node_tokens": poison(room),
        "node_positions": poison(room, torch.int64),
        "node_slots": poison(room, torch.int64),
        "mask_rows": poison(ends[-1] + 1, torch.int64) if finds_masks else None,
        "num_mask_rows": poison(1, torch.int64) if finds_masks else None,
    }


def cut_to_blocks(step):
    """A block of one row is none: vLLM wants one logit of it."""
    blocks = step.blocks
    line = np.where(blocks.num_rows > 1, blocks.line, -1)
    return type(blocks).build(blocks.table, line, blocks.num_rows)


@given(
    template=templates(),
    num_requests=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    with_masks=st.booleans(),
    finds_masks=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_kernel_and_twin_lay_out_a_step_as_the_cpu_runner_does(
    template, num_requests, seed, with_masks, finds_masks
):
    table = TemplateTable(template)
    blocks = cut_to_blocks(Step.random(table, num_requests, seed))
    for function in FUNCTIONS:
        given_ = arguments(blocks, table, seed, with_masks, finds_masks)
        linear = given_["positions"].clone().numpy()
        function(**given_)
        got = {name: given_[name] for name in OUTPUTS}
        n, nodes = num_requests, given_["num_nodes"]
        assert got["line"].tolist() == [*blocks.line.tolist(), *[-1] * SPARE]
        assert got["first_row"][:n].tolist() == blocks.first_row.tolist()
        assert got["num_rows"][:n].tolist() == blocks.num_rows.tolist()
        assert got["context_len"][:n].tolist() == linear[blocks.first_row].tolist()
        positions = given_["positions"]
        assert positions.tolist() == (linear + blocks.depth_of_rows()).tolist()

        rows = got["logits_rows"][: n * nodes].view(n, nodes)
        own = np.arange(nodes) < blocks.num_nodes[:, None]
        assert rows.numpy()[own].tolist() == blocks.node_rows().tolist()
        last = rows.gather(1, torch.from_numpy(blocks.num_nodes - 1)[:, None])
        assert (rows == last)[torch.from_numpy(~own)].all()
        flat = rows.flatten()
        assert torch.equal(got["node_tokens"][: n * nodes], given_["input_ids"][flat])
        assert torch.equal(got["node_positions"][: n * nodes], positions[flat])
        assert torch.equal(got["node_slots"][: n * nodes], given_["slots"].repeat_interleave(nodes))

        if with_masks:  # the step's mask rows are found from first_mask
            found = []
            for request in np.flatnonzero(blocks.line >= 0):
                held = max(
                    int(blocks.num_rows[request]) - int(table.num_nodes[blocks.line[request]]), 0
                )
                held = min(held, int(given_["table"].num_masks[blocks.line[request]]))
                first = int(got["first_mask"][request])
                found += got["logits_rows"][first : first + held].tolist()
        expected = [
            int(blocks.first_row[request]) + place
            for request in np.flatnonzero(blocks.line >= 0)
            for place in np.flatnonzero(table.mask_index[blocks.line[request]] >= 0)
            if place < blocks.num_rows[request]
        ]
        if with_masks:
            assert found == expected
        else:
            nodes_of_line = np.where(blocks.line >= 0, table.num_nodes[blocks.line], 1)
            assert got["first_mask"][:n].tolist() == (blocks.first_row + nodes_of_line).tolist()
        if finds_masks:
            assert got["num_mask_rows"].tolist() == [len(expected)]
            assert got["mask_rows"][: len(expected)].tolist() == expected


def test_more_requests_than_a_program_counts_at_once():
    table = TemplateTable(Template.from_widths([2], 2))
    many = 2 * int(module.BLOCK_REQUESTS.value) + 5
    blocks = cut_to_blocks(Step.random(table, many, seed=4))
    ours, theirs = (arguments(blocks, table) for _ in FUNCTIONS)
    begin_step(**ours)
    begin_step_naive(**theirs)
    for name in (*OUTPUTS, "positions"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("slots", lambda t: t.int(), "slots has dtype torch.int32, expected torch.int64"),
        ("query_start", lambda t: t[:-1], r"query_start has shape \[4\], expected \[5\]"),
        ("positions", lambda t: t[:-1], r"positions has shape \[\d+\], expected"),
        ("line", lambda t: t[:3], "line has 3 places, expected one for 4 requests"),
        ("logits_rows", lambda t: t[:8], "logits_rows has 8 places, expected at least"),
        ("num_nodes", lambda n: 0, "num_nodes is 0 and"),
        ("num_masks", lambda n: 99, "num_masks 99, expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_launch(name, change, message):
    table = TemplateTable(Template.from_widths([2, 2], 2))
    given_ = arguments(cut_to_blocks(Step.random(table, 4, seed=0)), table)
    if name == "line":
        for other in OUTPUTS[1:5]:
            given_[other] = given_[other][:3]
    with pytest.raises(ValueError, match=message):
        begin_step(**{**given_, name: change(given_[name])})
    assert (given_["logits_rows"] == POISON).all()


def test_kinds_of_arguments_that_were_checked_do_not_pile_up(monkeypatch):
    """Prefill has any number of rows: in a server that runs for long, nearly every mixed step is a kind of its own."""
    monkeypatch.setattr(checks, "MAX_KINDS", 8)
    table = TemplateTable(Template.from_widths([2, 1], 3))
    for chunk in range(1, 21):
        rows = np.array([table.template.num_rows, chunk])
        begin_step(**arguments(StepBlocks.build(table, np.array([2, -1]), rows), table))
    assert 1 <= len(module._checked) <= 8


def test_every_launcher_forgets_kinds():
    launchers = Path(module.__file__).parent.glob("*.py")
    found = [path.name for path in launchers if "_checked.add(" in path.read_text()]
    assert not found, "use checks.remember"

"""Templates: shape, prefixes, candidates, files, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bita_vllm.tree import Template, TemplateError, TemplateTable
from bita_vllm.tree.shape import COPY_RANK


@st.composite
def templates(draw):
    num_nodes = draw(st.integers(1, 10))
    nodes, used = [], set()
    for row in range(1, num_nodes + 1):
        parent, rank = draw(st.integers(0, row - 1)), draw(st.integers(0, 5))
        if (parent, rank) not in used:
            used.add((parent, rank))
            nodes.append((parent, rank) if parent <= len(nodes) else (0, 6 + row))
    groups = {row: draw(st.integers(0, 4)) for row in range(len(nodes) + 1)}
    groups[0] = draw(st.integers(1, 4))
    return Template.build(nodes, groups)


def test_the_papers_tree_has_52_rows():
    template = Template.from_widths([5, 4, 3], 3)
    assert (template.num_rows, template.num_nodes, template.max_depth) == (52, 13, 3)
    assert np.bincount(template.depth[:13]).tolist() == [1, 5, 4, 3]
    assert (template.group_length == 3).all()
    # only the top candidate of each depth has children
    parents = set(template.parent[1:13].tolist())
    assert len(parents) == 3 and all(template.rank[p] == 0 for p in parents - {0})


def test_the_likeliest_path_lies_in_its_slots_already():
    template = Template.from_widths([5, 4, 3], 3)
    assert template.parent[1:4].tolist() == [0, 1, 2] and template.rank[1:4].tolist() == [0, 0, 0]


@given(templates())
@settings(max_examples=200, deadline=None)
def test_every_prefix_is_a_valid_block(template):
    assert (template.parent[1:] < np.arange(1, template.num_rows)).all()
    assert (
        template.depth[0] == 0
        and (template.depth[1:] == template.depth[template.parent[1:]] + 1).all()
    )
    assert not np.triu(template.ancestors, 1).any()


@given(templates())
@settings(max_examples=200, deadline=None)
def test_candidates_come_from_the_nearest_mask_that_predicts_their_position(template):
    first = {int(template.parent[r]): int(r) for r in np.flatnonzero(template.mask_index == 0)}
    for node in range(template.num_nodes):
        for d in range(template.num_masks):
            expected, ancestor = -1, node
            while ancestor >= 0 and expected < 0:
                index = d + template.depth[node] - template.depth[ancestor]
                if index < template.group_length[ancestor]:
                    expected = first[ancestor] + index
                ancestor = int(template.parent[ancestor])
            row = template.candidate_rows[node, d]
            assert row == expected
            if row >= 0:  # a mask row's depth is one less than the depth of the token it predicts
                assert template.depth[row] == template.depth[node] + d + 1
        filled = template.candidate_rows[node] >= 0
        assert (np.diff(filled.astype(int)) <= 0).all()


@given(templates())
@settings(max_examples=100, deadline=None)
def test_restricting_keeps_shallow_nodes_and_their_groups(template):
    for depths in range(template.max_depth + 1):
        part = template.restrict(depths)
        kept = template.depth[: template.num_nodes] <= depths
        assert part.num_nodes == kept.sum()
        assert (part.depth[: part.num_nodes] == template.depth[: template.num_nodes][kept]).all()
        assert (part.group_length == template.group_length[kept]).all()


@given(templates())
@settings(max_examples=50, deadline=None)
def test_template_files_round_trip(tmp_path_factory, template):
    path = tmp_path_factory.mktemp("tree") / "template.json"
    template.save(path)
    loaded = Template.load(path)
    for name in ("parent", "rank", "mask_index"):
        assert np.array_equal(getattr(loaded, name), getattr(template, name))


@given(templates())
@settings(max_examples=50, deadline=None)
def test_the_table_holds_every_restriction(template):
    table = TemplateTable(template)
    for line in range(template.max_depth + 1):
        part = template.restrict(line)
        n = part.num_rows
        assert table.num_rows[line] == n and table.num_nodes[line] == part.num_nodes
        assert np.array_equal(table.depth[line, :n], part.depth)
        assert np.array_equal(table.ancestors[line, :n, :n], part.ancestors)
        assert not table.ancestors[line, n:].any()


@pytest.mark.parametrize(
    "make, facts",
    [
        (lambda: Template.build([(2, 0)], {0: 1}), ["node 1", "parent 2"]),
        (lambda: Template.build([(0, -1)], {0: 1}), ["rank -1"]),
        (lambda: Template.build([(0, 0), (0, 0)], {0: 1}), ["two nodes"]),
        (lambda: Template.build([(0, 0)], {1: 2}), ["root needs a mask group"]),
        (lambda: Template.build([(0, 0)], {0: 1, 7: 1}), ["row 7", "0 to 1"]),
        (
            lambda: Template.build([(0, r) for r in range(60)], dict.fromkeys(range(60), 4)),
            ["301", "256"],
        ),
        (lambda: Template.from_widths([2, 0], 3), ["[2, 0]"]),
        (lambda: Template.from_widths([2, 2, 2, 2], 3), ["4 depths", "3 mask tokens"]),
    ],
    ids=[
        "late-parent",
        "negative-rank",
        "twins",
        "no-root-group",
        "group-nowhere",
        "too-many",
        "width-0",
        "too-deep",
    ],
)
def test_bad_templates_are_refused_in_one_sentence(make, facts):
    with pytest.raises(TemplateError) as error:
        make()
    assert all(fact in str(error.value) for fact in facts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"nodes": 3, "groups": {}}', '{"nodes": [[0]], "groups": {}}']
)
def test_bad_template_files_are_refused_with_an_example(tmp_path, content):
    path = tmp_path / "template.json"
    path.write_text(content)
    with pytest.raises(TemplateError, match="expected JSON like"):
        Template.load(path)


def test_a_chain_of_copies_follows_the_nodes_that_masks_fill():
    template = Template.build([(0, 0), (0, 1), (1, 0)], {0: 3, 2: 1, 5: 2}, copies=4)
    assert template.rank[:8].tolist() == [-1, 0, 1, 0, *[COPY_RANK] * 4]
    assert template.parent[:8].tolist() == [-1, 0, 0, 1, 0, 4, 5, 6]
    assert (template.max_depth, template.mask_depth, template.max_rank) == (4, 2, 2)
    # M2 and M3 of the root's group are still ahead of a walk that ended on the first copy.
    assert template.candidate_rows[4].tolist() == [9, 10, -1]
    assert template.candidate_rows[5].tolist() == [12, 13, -1]
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))).to_dict() == (
        template.to_dict()
    )

    cut = template.restrict(1)
    assert cut.parent[:7].tolist() == [-1, 0, 0, 0, 3, 4, 5]
    assert cut.group_length.tolist() == [3, 0, 1, 0, 2, 0, 0]
    assert template.restrict(0).num_rows == 1 + 4 + 3 + 2

    table = TemplateTable(template, Template.build([], {}, copies=2))
    assert table.num_rows.tolist() == [10, 13, 14, 3]
    assert table.rank[3, :3].tolist() == [-1, 2, 2]


def test_copies_alone_need_no_mask_group():
    assert Template.build([], {}, copies=3).num_rows == 4
    with pytest.raises(TemplateError, match="the root needs a mask group"):
        Template.build([(0, 0)], {})

"""Step blocks against plain-Python loops: rows, walk, next blocks."""

import numpy as np
import pytest

from bita_vllm.step.host import NO_BLOCK, StepBlocks, fill_blocks
from bita_vllm.tree import Template, TemplateTable

FIRST_MASK_ID = 1000
TABLES = {
    "5-4-3": TemplateTable(Template.from_widths([5, 4, 3], 3)),
    "missing-groups": TemplateTable(
        Template.build([(0, 0), (0, 1), (1, 0), (3, 0), (2, 2)], {0: 3, 1: 1, 3: 2})
    ),
    "chain": TemplateTable(Template.from_widths([1, 1], 2)),
    "ladder": TemplateTable(
        Template.build([(0, 0)], {0: 1}),
        Template.build([(0, 0), (0, 1), (1, 0)], {0: 3, 2: 1}),
        Template.from_widths([3, 2, 1], 3),
    ),
    "copies": TemplateTable(
        Template.build([(0, 0), (0, 1), (1, 0)], {0: 3, 1: 1, 5: 2}, copies=4),
        Template.build([(0, 0), (1, 0), (2, 0)], {0: 3, 3: 3}),
        Template.build([], {0: 2}, copies=2),
        Template.build([], {}, copies=7),
    ),
}


def make_step(table, seed, num_requests=9):
    """Random lines, cuts and prefill rows. Copies may repeat the candidates beside them; other siblings differ."""
    generator = np.random.default_rng(seed)
    line = generator.integers(-1, len(table.num_rows), num_requests)
    full = np.where(line >= 0, table.num_rows[line], generator.integers(1, 30, num_requests))
    cut = generator.random(num_requests) < 0.3
    scheduled = np.where(cut & (line >= 0), generator.integers(1, full + 1), full)
    blocks = StepBlocks.build(table, line, scheduled)
    tokens = generator.permutation(500)[: blocks.num_nodes.sum()]
    for request, num_nodes in enumerate(blocks.num_nodes):
        own, held = line[request], tokens[blocks.first_node[request] :][:num_nodes]
        for node in np.flatnonzero(table.rank[own, :num_nodes] == table.max_rank):
            beside = np.flatnonzero(table.depth[own, :node] == table.depth[own, node])
            if len(beside) and generator.random() < 0.7:
                held[node] = held[beside[0]]
    return generator, blocks, tokens


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("seed", range(8))
def test_rows_positions_and_nodes(name, seed):
    table = TABLES[name]
    _, blocks, _ = make_step(table, seed)
    rows, mask_rows, offsets, start = [], [], [], 0
    for line, n in zip(blocks.line, blocks.num_rows, strict=True):
        if line == NO_BLOCK:
            rows.append(start + n - 1)
            offsets += [0] * n
        else:
            rows += range(start, start + min(n, table.num_nodes[line]))
            mask_rows += range(start + table.num_nodes[line], start + n)
            offsets += [table.depth[line, i] - i for i in range(n)]
        start += n
    assert blocks.node_rows().tolist() == rows
    assert blocks.mask_rows().tolist() == mask_rows
    assert blocks.depth_of_rows().tolist() == offsets


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("seed", range(20))
def test_walk_and_next_blocks_equal_a_plain_loop(name, seed):
    table = TABLES[name]
    generator, blocks, tokens = make_step(table, seed)
    template = seed % len(table.first_line)  # of the next blocks
    # targets that often match a child: half of the nodes want one of their children's tokens
    targets = generator.integers(600, 700, len(tokens))
    for request, line in enumerate(blocks.line):
        first = blocks.first_node[request]
        for child in range(1, blocks.num_nodes[request]):
            if generator.random() < 0.5:
                targets[first + table.parent[line, child]] = tokens[first + child]
    emitting = generator.random(len(blocks.line)) < 0.9
    calls = []

    def sample(nodes, walking, step):
        calls.append((step, int(walking.sum())))
        return targets[nodes]

    walk = blocks.walk(tokens, sample, emitting)
    masks = blocks.chosen_masks(walk, int(table.mask_depths[template]))
    assert [step for step, _ in calls] == list(range(len(calls)))
    for request, line in enumerate(blocks.line):
        first, num_nodes = blocks.first_node[request], blocks.num_nodes[request]
        emitted, path, followed = [], [], [0]
        node = 0
        while emitting[request] and followed:
            node = followed[0]
            emitted.append(targets[first + node])
            path.append(node)
            followed = [
                c
                for c in range(1, num_nodes)
                if table.parent[line, c] in followed and tokens[first + c] == emitted[-1]
            ]
        assert walk.tokens[request, : len(emitted)].tolist() == emitted
        assert (walk.tokens[request, len(emitted) :] == -1).all()
        assert walk.path[request, : len(path)].tolist() == path
        assert walk.num_emitted[request] == len(emitted)
        assert walk.last_node[request] == node
        available = 0
        if line != NO_BLOCK:
            rows = table.candidate_rows[line, node]
            while (
                available < table.mask_depths[template]
                and 0 <= rows[available] < blocks.num_rows[request]
            ):
                assert masks.rows[request, available] == blocks.first_row[request] + rows[available]
                available += 1
        assert masks.depths[request] == available
        assert (masks.rows[request, available:] == -1).all()
    request, row, place = walk.moves()
    assert all(
        walk.path[r, p] == w and p < walk.num_emitted[r]
        for r, w, p in zip(request, row, place, strict=True)
    )


@pytest.mark.parametrize("name", TABLES)
def test_next_block_holds_candidates_by_rank_then_mask_ids(name):
    table = TABLES[name]
    _, blocks, tokens = make_step(table, 3, num_requests=30)
    template = len(table.first_line) - 1
    walk = blocks.walk(tokens, lambda nodes, *_: np.full(len(nodes), 900), np.ones(30, dtype=bool))
    masks = blocks.chosen_masks(walk, int(table.mask_depths[template]))
    lines = table.first_line[template] + masks.depths
    used = masks.rows[masks.rows >= 0]
    candidates = masks.by_depth(used[:, None] * 10 + np.arange(table.max_rank + 1))
    candidates[..., table.max_rank] = 7000 + np.arange(table.max_depth)  # copies
    drafts = fill_blocks(table, lines, candidates, FIRST_MASK_ID)
    for request, draft in enumerate(drafts):
        line = lines[request]
        assert len(draft) == table.num_rows[line] - 1
        for row, token in enumerate(draft, start=1):
            if table.rank[line, row] == table.max_rank:
                assert token == 7000 + table.depth[line, row] - 1
            elif row < table.num_nodes[line]:
                source = masks.rows[request, table.depth[line, row] - 1]
                assert token == source * 10 + table.rank[line, row]
            else:
                assert token == FIRST_MASK_ID + table.mask_index[line, row]


def test_after_a_plain_step_blocks_have_no_candidates():
    table = TABLES["ladder"]
    none = np.zeros((2, 1, 1), dtype=np.int64)
    drafts = fill_blocks(table, table.first_line[[1, 1]], none, FIRST_MASK_ID)
    assert drafts == [[FIRST_MASK_ID, FIRST_MASK_ID + 1, FIRST_MASK_ID + 2]] * 2


def test_lines_of_templates_lie_behind_each_other():
    table = TABLES["ladder"]
    assert table.first_line.tolist() == [0, 2, 5]
    assert table.num_rows.tolist() == [2, 3, 4, 7, 8, 4, 16, 24, 28]
    assert (table.max_depth, table.max_nodes, table.depth.shape[1]) == (3, 7, 28)

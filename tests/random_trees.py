"""Random templates, and steps of random requests that run them, for the kernel tests (hypothesis)."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from bita_vllm.step.host import NO_BLOCK, StepBlocks
from bita_vllm.tree import Template, TemplateTable

MAX_RANK = 6


@st.composite
def templates(draw: st.DrawFn) -> Template:
    """Up to 10 draft nodes anywhere, up to 6 copies, mask groups of 1 to 5 under the root and some of the nodes."""
    nodes: list[tuple[int, int]] = []
    for row in range(1, draw(st.integers(1, 10)) + 1):
        parent = draw(st.integers(0, row - 1))
        taken = {rank for other, rank in nodes if other == parent}
        free = [rank for rank in range(MAX_RANK) if rank not in taken]
        if free:
            nodes.append((parent, draw(st.sampled_from(free))))
        else:
            break
    copies = draw(st.integers(0, 6))
    groups = draw(st.dictionaries(st.integers(1, len(nodes) + copies), st.integers(1, 5)))
    return Template.build(nodes, {**groups, 0: draw(st.integers(1, 5))}, copies)


def random_template(rng: np.random.Generator) -> Template:
    """As `templates`, from a seeded generator."""
    num_nodes = int(rng.integers(1, 11))
    nodes = [(int(rng.integers(0, row)), 0) for row in range(1, num_nodes + 1)]
    seen: dict[int, int] = {}
    for i, (parent, _) in enumerate(nodes):
        nodes[i] = (parent, seen.get(parent, 0))
        seen[parent] = seen.get(parent, 0) + 1
    groups = {row: int(rng.integers(1, 6)) for row in range(1, num_nodes + 1) if rng.random() < 0.5}
    return Template.build(nodes, {**groups, 0: int(rng.integers(1, 6))})


@dataclass
class Step:
    """B requests: blocks of any line, some of them cut, among prefills; targets often follow a child.

    Attributes:
        row_tokens: `[rows of the step]` int64, distinct in node rows but for a few, and for copies, most of which
            repeat a node beside them.
        targets: `[N]` int64, target token of every node row.
        emitting: `[B]` bool.
    """

    blocks: StepBlocks
    row_tokens: np.ndarray
    targets: np.ndarray
    emitting: np.ndarray

    @classmethod
    def random(cls, table: TemplateTable, num_requests: int, seed: int) -> "Step":
        generator = np.random.default_rng(seed)
        line = generator.integers(NO_BLOCK, len(table.num_rows), num_requests)
        full = np.where(line >= 0, table.num_rows[line], generator.integers(1, 9, num_requests))
        # Padded to R, as a fixed-shape step has it, or cut short, or as long as the line.
        padded = (line >= 0) & (generator.random(num_requests) < 0.3)
        full = np.where(padded, table.template.num_rows, full)
        cut = (line >= 0) & (generator.random(num_requests) < 0.3)
        blocks = StepBlocks.build(table, line, np.where(cut, generator.integers(1, full + 1), full))
        row_tokens = generator.permutation(10_000)[: blocks.num_rows.sum()]
        doubled = generator.random(len(row_tokens)) < 0.1
        row_tokens[doubled] = row_tokens[0]
        for request in np.flatnonzero(line >= 0):
            depth, held = table.depth[line[request]], row_tokens[blocks.first_row[request] :]
            is_copy = table.rank[line[request], : blocks.num_nodes[request]] == table.max_rank
            for node in np.flatnonzero(is_copy & (generator.random(len(is_copy)) < 0.7)):
                held[node] = held[np.flatnonzero(depth[: node + 1] == depth[node])[0]]
        targets = generator.integers(20_000, 30_000, blocks.num_nodes.sum())
        for request in np.flatnonzero(line >= 0):
            # Beyond the cut lie other requests' rows, whose tokens must not count as children.
            for node in range(1, table.num_nodes[line[request]]):
                parent, row = table.parent[line[request], node], blocks.first_row[request] + node
                inside = parent < blocks.num_nodes[request] and row < len(row_tokens)
                if inside and generator.random() < 0.5:
                    targets[blocks.first_node[request] + parent] = row_tokens[row]
        return cls(blocks, row_tokens, targets, generator.random(num_requests) < 0.9)


def int32(array: np.ndarray) -> torch.Tensor:
    """The array as an int32 tensor."""
    return torch.from_numpy(array.astype(np.int32))

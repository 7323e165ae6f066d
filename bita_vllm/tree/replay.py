"""Decoding with a tree, replayed on a known greedy answer in the same steps that the engine takes.

The engine emits the greedy answer whatever the drafts are; drafts only decide how many tokens a step
emits. So a step is known from the ranks that the answer's tokens have in the mask rows' predictions:
no model is needed once these are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bita_vllm.tree.template import Template, TemplateTable

NO_RANK = np.iinfo(np.int32).max  # of a token after the answer's end


@dataclass(frozen=True)
class Replay:
    """The steps of one answer after its prefill.

    Attributes:
        lengths: accepted length of each step; they sum to the answer's tokens less the first.
        candidates: (mask index, rank of the answer's token) at every node that a walk reached and
            that had candidates for the token after it.
    """

    lengths: list[int]
    candidates: list[tuple[int, int]]


# By depth: the group and the mask that give the candidates, as (index of the group's answer token, mask index).
Sources = list[tuple[int, int]]


class Step(NamedTuple):
    """One step of a request.

    Attributes:
        line: of the template table, the block that it had.
        last_node: row in the block where the walk stopped.
        emitted: accepted length.
        sources: of the next step's candidates.
    """

    line: int
    last_node: int
    emitted: int
    sources: Sources


class TreeWalker:
    """Replays answers, step by step.

    The rules are the engine's (`StepBlocks.walk`, `StepBlocks.next_blocks`). The step after prefill has no
    candidates. A walk that stops at a node takes the candidates of the next step from the node's own mask group, and
    beyond its last depth from the predictions of the nearest ancestors' groups. With several templates each step
    may use another. Blocks that the scheduler cuts short (end of the context, full token budget) are not replayed.
    """

    def __init__(self, *templates: Template) -> None:
        self.table = table = TemplateTable(*templates)
        # [line]: (node, rank) -> child; [line][node]: (depth of the group's node, mask index) by depth
        self._children: list[dict[tuple[int, int], int]] = []
        self._sources: list[list[list[tuple[int, int]]]] = []
        for line, num_nodes in enumerate(table.num_nodes.tolist()):
            parent, rank = table.parent[line].tolist(), table.rank[line].tolist()
            self._children.append({(parent[row], rank[row]): row for row in range(1, num_nodes)})
            mask_index, depth = table.mask_index[line], table.depth[line]
            owner_depth = (
                depth - mask_index - 1
            )  # of a mask row: the group hangs one below its node
            self._sources.append(
                [
                    [(int(owner_depth[row]), int(mask_index[row])) for row in rows if row >= 0]
                    for rows in table.candidate_rows[line, :num_nodes]
                ]
            )

    def line(self, sources: Sources, template: int = 0) -> int:
        """Line of the table: the block of a template that has these candidates."""
        depths = min(len(sources), int(self.table.mask_depths[template]))
        return int(self.table.first_line[template]) + depths

    def step(
        self,
        # [n][k] ranks, as `replay` takes them
        by_place: list[list[int]],
        root: int,
        sources: Sources,
        template: int = 0,
    ) -> Step:
        """The step whose root is that token of the answer."""
        line, last = self.line(sources, template), len(by_place) - 1
        children = self._children[line]
        node, emitted = 0, 1
        for place, mask_index in sources:
            child = children.get((node, by_place[place][mask_index]))
            if child is None or root + emitted == last:
                break
            node, emitted = child, emitted + 1
        left = [(root + depth, mask) for depth, mask in self._sources[line][node]]
        return Step(line, node, emitted, left)

    def replay(
        self,
        # [n, k] rank of answer token i+2+j in the prediction of mask index j under answer token i
        ranks: np.ndarray,
        # sources of a step's candidates -> its template
        choose: Callable[[Sources], int] = lambda sources: 0,
    ) -> Replay:
        """All steps of an answer of n tokens; with the first template unless another is chosen."""
        by_place = ranks.tolist()
        root = 0
        sources: Sources = []
        lengths, candidates = [], []
        while root < len(by_place) - 1:
            _, _, emitted, next_sources = self.step(by_place, root, sources, choose(sources))
            reached = sources[:emitted]
            candidates += [(mask, by_place[place][mask]) for place, mask in reached]
            sources = next_sources
            root += emitted
            lengths.append(emitted)
        return Replay(lengths, candidates)

"""Accepted lengths as they are seen while serving: the masks' acceptance, and what copied tokens add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bita_vllm.tree import TemplateTable
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.markov import reach_by_depths
from bita_vllm.tree.search import evaluate
from bita_vllm.tree.shape import TreeBatch
from bita_vllm.tree.template_set import TemplateSet, templates_of

if TYPE_CHECKING:
    from bita_vllm.tree import Template

FADE = 0.9  # of all counts, at each review: half is left after a minute
PRIOR_HITS = 30.0  # the expectation weighs as much as this many seen hits
PRIOR_BLOCKS = 280.0  # and as this many blocks


class Acceptance:
    """Acceptance as it is now, from where walks stopped and where they were expected to.

    The expectation is the adapter's statistics. What is learnt is a factor on them, by depth and rank: seen hits
    over expected ones, drawn towards the factor of the depth, and that towards 1.
    """

    def __init__(
        self,
        ladder: Ladder,
        # [ages, 2, k, ranks]
        expected: np.ndarray,
    ) -> None:
        self.expected = expected
        sets, table = ladder.template_sets, ladder.table
        num_nodes = table.max_nodes
        self._stops = np.zeros((len(table.num_nodes), num_nodes))  # blocks by line and last node
        self._parent = table.parent[:, :num_nodes]
        is_draft = np.arange(num_nodes) < table.num_nodes[:, None]
        is_draft[:, 0] = False
        self._line, self._node = np.nonzero(is_draft)
        self._depth = table.depth[self._line, self._node] - 1  # of the prediction: 0 is the first
        self._rank = table.rank[self._line, self._node]
        self._chance = self._expected_chance(templates_of(sets), table)
        # Where blocks choose their tree, its nodes are accepted more often than on the whole.
        lengths = evaluate([one.first.shape for one in sets], expected).accepted_length
        gains = np.array([one.gain for one in sets])
        lift = 1 + lengths * (gains - 1) / np.maximum(lengths - 1, 1e-9)
        set_of_line = np.repeat(np.arange(len(sets)), [lines_of(one) for one in sets])
        self._chance = np.minimum(self._chance * lift[set_of_line[self._line]], 1.0)

    def _expected_chance(self, templates: Sequence[Template], table: TemplateTable) -> np.ndarray:
        """`[drafts]` P(the node is accepted | its parent was, the line)."""
        reach = np.full(self._stops.shape, np.nan)
        for template, first in zip(templates, table.first_line.tolist(), strict=True):
            if template.num_copies:  # how far masks alone would have come is not seen in its blocks
                continue
            # Node rows keep their order in a restricted template, but not their numbers.
            whole = reach_by_depths(TreeBatch.of([template.shape]), self.expected)[0]
            for depths in range(template.mask_depth + 1):
                kept = template.kept_nodes(depths)
                reach[first + depths, : len(kept)] = whole[depths, kept]
        parent = reach[self._line, self._parent[self._line, self._node]]
        with np.errstate(invalid="ignore", divide="ignore"):
            return reach[self._line, self._node] / parent

    def add(
        self,
        # [B] line of the template table, -1 for none
        line: np.ndarray,
        # [B] row where the walk stopped
        node: np.ndarray,
    ) -> None:
        """Count where the walks of a step stopped."""
        np.add.at(self._stops, (line[line >= 0], node[line >= 0]), 1.0)

    def fade(self) -> None:
        """Let older evidence count less."""
        self._stops *= FADE

    @property
    def num_blocks(self) -> float:
        """Blocks that were seen, older ones counted less."""
        return float(self._stops.sum())

    def estimate(self) -> np.ndarray:
        """`[ages, 2, k, ranks]` acceptance as it is now."""
        visits = self._stops.copy()
        every_line = np.arange(len(visits))
        for node in range(visits.shape[1] - 1, 0, -1):
            parent = self._parent[:, node]
            visits[every_line, np.maximum(parent, 0)] += np.where(parent >= 0, visits[:, node], 0.0)
        tried = visits[self._line, self._parent[self._line, self._node]]
        known = np.isfinite(self._chance) & (tried > 0)
        place = self._depth[known], self._rank[known]
        shape = self.expected.shape[2], int(self._rank.max()) + 1
        hits, expected = np.zeros(shape), np.zeros(shape)
        np.add.at(hits, place, visits[self._line, self._node][known])
        np.add.at(expected, place, (tried * self._chance)[known])
        of_depth = (hits.sum(axis=1) + PRIOR_HITS) / (expected.sum(axis=1) + PRIOR_HITS)
        factor = np.repeat(of_depth[:, None], self.expected.shape[3], axis=1)  # [k, ranks]
        factor[:, : shape[1]] = (hits + PRIOR_HITS * of_depth[:, None]) / (expected + PRIOR_HITS)
        found = self.expected.copy()
        for age in range(found.shape[0]):
            for mask in range(age, found.shape[2]):
                found[age, :, mask] *= factor[mask - age]
        return found / np.maximum(found.sum(axis=-1, keepdims=True), 1.0)


class Copying:
    """What copied tokens add: accepted lengths that were seen, over those that masks alone are expected to reach.

        lift = (tokens of blocks + PRIOR_BLOCKS * e) / (tokens expected of them + PRIOR_BLOCKS * e)

    with e the mean expectation; 1 where no template copies. Copies depend on the texts that are served.
    """

    def __init__(
        self,
        ladder: Ladder,
        # [T] accepted length with masks alone, by template set
        lengths: np.ndarray,
    ) -> None:
        self._copies = any(t.num_copies for t in templates_of(ladder.template_sets))
        self._depth = ladder.table.depth
        self._lengths = lengths
        self._tokens = self._expected = 0.0

    def add(
        self,
        # [blocks] template set, line of the table, row where the walk stopped
        sets: np.ndarray,
        lines: np.ndarray,
        nodes: np.ndarray,
    ) -> None:
        """Count the tokens of a step's blocks."""
        if self._copies:
            self._tokens += float(self._depth[lines, nodes].sum() + len(lines))
            self._expected += float(self._lengths[sets].sum())

    def with_copies(
        self,
        # [T] accepted length with masks alone, as it is now
        lengths: np.ndarray,
    ) -> np.ndarray:
        """`[T]` accepted length of blocks that may copy."""
        self._lengths = lengths
        prior = PRIOR_BLOCKS * float(lengths.mean())
        return lengths * ((self._tokens + prior) / (self._expected + prior))

    def fade(self) -> None:
        """Let older evidence count less."""
        self._tokens *= FADE
        self._expected *= FADE


def lines_of(templates: TemplateSet) -> int:
    """Lines that a set has in a `TemplateTable`."""
    return sum(template.mask_depth + 1 for template in templates.templates)

"""Trees as their nodes: one that is moved about in a search, and many side by side (NumPy only)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bita_vllm.system.file_schemas import MAX_RANKS

COPY_RANK = MAX_RANKS  # in place of a rank: the node's token is copied from text already seen


@dataclass(frozen=True)
class TreeShape:
    """A tree as its nodes, in any order that has parents first: what templates are compared and made by.

    Attributes:
        parent: parent of each node, -1 for the root.
        rank: candidate rank of each node, -1 for the root.
        group: length of the mask group under each node.
    """

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    group: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.parent) + sum(self.group)

    def depths(self) -> list[int]:
        depths = [0]
        for parent in self.parent[1:]:
            depths.append(depths[parent] + 1)
        return depths

    def grown(self, num_masks: int, num_ranks: int, max_rows: int) -> Iterator[TreeShape]:
        """One longer mask group; one more node with or without a group; a deeper node with all groups longer.

        The last makes depths reachable that pay only once many groups are long enough for them.
        """
        depths, room = self.depths(), max_rows - self.num_rows
        deepest = max(depths)
        for node, depth in enumerate(depths):
            has = self.group[node]
            for length in range(has + 1, min(num_masks, has + room) + 1):
                yield replace(self, group=_put(self.group, node, length))
            rank = self.parent.count(node)
            if depth == num_masks or rank == num_ranks or not room:
                continue
            child = TreeShape((*self.parent, node), (*self.rank, rank), self.group)
            for length in range(min(num_masks, room - 1) + 1):
                yield replace(child, group=(*self.group, length))
                if depth == deepest and length > depth:
                    longer = tuple(max(n, length) if n else 0 for n in self.group)
                    for own in {1, length}:
                        deeper = replace(child, group=(*longer, own))
                        if deeper.num_rows <= max_rows:
                            yield deeper

    def shrunk(self) -> Iterator[TreeShape]:
        """One shorter mask group (never the root's last row); one leaf less, and its group."""
        for node, has in enumerate(self.group):
            for length in range(1 if node == 0 else 0, has):
                yield replace(self, group=_put(self.group, node, length))
            if node and node not in self.parent and self._is_last_child(node):
                parent = tuple(p - (p > node) for p in self.parent)
                yield TreeShape(
                    *(_drop(column, node) for column in (parent, self.rank, self.group))
                )

    def _is_last_child(self, node: int) -> bool:
        return self.parent.count(self.parent[node]) == self.rank[node] + 1


@dataclass(frozen=True)
class TreeBatch:
    """C trees side by side, one a line, padded to N nodes. The root is node 0.

    Attributes:
        parent: `[C, N]` node of the parent, which comes first; -1 for the root.
        rank: `[C, N]` candidate rank; -1 for the root and in padding.
        group: `[C, N]` length of the mask group under the node.
    """

    parent: np.ndarray
    rank: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, shapes: Sequence[TreeShape]) -> TreeBatch:
        """Put shapes side by side, padded to the largest of them."""
        num_nodes = max(len(shape.parent) for shape in shapes)

        def column(values: Iterable[tuple[int, ...]], padding: int) -> np.ndarray:
            lines = [value + (padding,) * (num_nodes - len(value)) for value in values]
            return np.array(lines, dtype=np.int64)

        return cls(
            parent=column((shape.parent for shape in shapes), 0),
            rank=column((shape.rank for shape in shapes), -1),
            group=column((shape.group for shape in shapes), 0),
        )

    def depth(self) -> np.ndarray:
        """`[C, N]` distance from the root; 0 in padding."""
        depth = np.zeros(self.parent.shape, dtype=np.int64)
        num_trees, num_nodes = self.parent.shape
        line = np.arange(num_trees)
        for node in range(1, num_nodes):
            below = depth[line, self.parent[:, node]] + 1
            depth[:, node] = np.where(self.rank[:, node] >= 0, below, 0)
        return depth

    def next_state(self, num_masks: int) -> np.ndarray:
        """`[C, N]` the set of mask predictions that a walk which stops at the node goes on with."""
        smaller = _without_smallest(num_masks)
        state = np.zeros(self.parent.shape, dtype=np.int64)
        num_trees, num_nodes = self.parent.shape
        line = np.arange(num_trees)
        own = (1 << self.group.astype(np.int64)) - 1
        state[:, 0] = own[:, 0]
        for node in range(1, num_nodes):
            left_over = state[line, self.parent[:, node]]
            state[:, node] = own[:, node] | smaller[left_over, self.group[:, node] + 1]
        return state


def _put(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _drop(values: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (*values[:place], *values[place + 1 :])


def _without_smallest(num_masks: int) -> np.ndarray:
    """`[2**k, k+2]` each set without its n smallest elements, n from 0 to k+1."""
    sets = np.arange(1 << num_masks)
    columns: Sequence[np.ndarray] = [sets]
    for _ in range(num_masks + 1):
        columns = [*columns, columns[-1] & (columns[-1] - 1)]
    return np.stack(columns, axis=1)

"""The step blocks of one scheduler step on the host, and the walk that verifies them. Vectorised over requests.

The CPU runner's: NumPy only, no vLLM types. `device.py` is its twin on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bita_vllm.tree import NO_BLOCK, TemplateTable


@dataclass
class StepBlocks:
    """Which rows of a step belong to which tree. B requests, N node rows over all of them.

    A request without a block (prefill chunk, decode step of one row) counts as one node: its last row.

    Attributes:
        line: `[B]` line of the template table, NO_BLOCK for a request without a block.
        num_rows: `[B]` rows of the request in this step (a block may have been cut by the scheduler).
        num_nodes: `[B]` node rows: the root and the draft nodes; 1 without a block.
        first_row: `[B]` index of the request's first node row among all rows of the step.
        first_node: `[B]` index of the request's first node among the N node rows.
    """

    table: TemplateTable
    line: np.ndarray
    num_rows: np.ndarray
    num_nodes: np.ndarray
    first_row: np.ndarray
    first_node: np.ndarray

    @classmethod
    def build(
        cls,
        table: TemplateTable,
        # [B] line of each request's block, NO_BLOCK for none
        line: np.ndarray,
        # [B] rows scheduled for each request
        num_scheduled: np.ndarray,
    ) -> StepBlocks:
        has_block = line >= 0
        num_nodes = np.where(has_block, np.minimum(table.num_nodes[line], num_scheduled), 1)
        ends = np.cumsum(num_scheduled)
        first_row = np.where(has_block, ends - num_scheduled, ends - 1)
        first_node = np.cumsum(num_nodes) - num_nodes
        return cls(table, line, num_scheduled, num_nodes, first_row, first_node)

    def node_rows(self) -> np.ndarray:
        """`[N]` rows of the step that hold nodes, request by request."""
        within = np.arange(self.num_nodes.sum()) - np.repeat(self.first_node, self.num_nodes)
        return np.repeat(self.first_row, self.num_nodes) + within

    def mask_rows(self) -> np.ndarray:
        """Rows of the step that hold masks, in ascending order."""
        places = np.arange(self.table.depth.shape[1])
        inside = (self.line >= 0)[:, None] & (places >= self.num_nodes[:, None])
        inside &= places < self.num_rows[:, None]
        return (self.first_row[:, None] + places)[inside]

    def depth_of_rows(self) -> np.ndarray:
        """`[rows of the step]` depth in the tree minus index in the block: a row's position minus its KV slot."""
        offset = np.zeros(int(self.num_rows.sum()), dtype=np.int64)
        rows = np.arange(self.table.depth.shape[1])
        inside = (self.line >= 0)[:, None] & (rows < self.num_rows[:, None])
        target = self.first_row[:, None] + rows
        offset[target[inside]] = (self.table.depth[self.line] - rows)[inside]
        return offset

    def walk(
        self,
        # [N] token of every node row
        node_tokens: np.ndarray,
        # (node index of each request [B], requests still walking [B] bool, step) -> sampled tokens [B]
        sample: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
        # [B] bool, False for requests that must not emit a token (partial prefill)
        emitting: np.ndarray,
    ) -> Walk:
        """Walk every tree from its root: take the target's token, follow the children that hold it.

        There are two where a copied token repeats a mask's candidate. The walk follows both; the first gives the target
        and the row, as their rows hold the same. The targets are sampled along the walk, with one call a depth. So
        each emitted token is drawn exactly as a plain step would draw it, given the tokens before it.
        """
        num_requests = len(self.line)
        longest = self.table.max_depth + 1
        tokens = np.full((num_requests, longest), -1, dtype=np.int64)
        path = np.zeros((num_requests, longest), dtype=np.int64)
        node = np.zeros(num_requests, dtype=np.int64)
        walking = emitting.copy()
        places = np.arange(self.table.max_nodes)
        inside = places < self.num_nodes[:, None]
        held = np.full(inside.shape, -1, dtype=np.int64)
        held[inside] = node_tokens
        parent = np.where(inside, self.table.parent[self.line][:, : len(places)], NO_BLOCK)
        parent[:, 0] = NO_BLOCK
        last = node
        for step in range(longest):
            sampled = sample(self.first_node + node, walking, step)
            tokens[walking, step] = sampled[walking]
            path[walking, step] = node[walking]
            children = ((parent == node[:, None]) | (parent == last[:, None])) & (
                held == sampled[:, None]
            )
            walking = walking & children.any(axis=1)
            if not walking.any():
                break
            node = np.where(walking, children.argmax(axis=1), node)
            last = np.where(walking, places[-1] - children[:, ::-1].argmax(axis=1), node)
        return Walk(tokens=tokens, path=path, num_emitted=(tokens >= 0).sum(axis=1), last_node=node)

    def chosen_masks(self, walk: Walk, max_depth: int) -> ChosenMasks:
        """Return the mask rows whose predictions are still ahead where each walk stopped, of at most `max_depth`."""
        rows = self.table.candidate_rows[self.line, walk.last_node]
        usable = (rows >= 0) & (rows < self.num_rows[:, None]) & (self.line >= 0)[:, None]
        depths = np.minimum(np.cumprod(usable, axis=1).sum(axis=1), max_depth)
        usable = np.arange(rows.shape[1]) < depths[:, None]
        return ChosenMasks(depths, np.where(usable, self.first_row[:, None] + rows, -1))


@dataclass
class Walk:
    """The accepted path of every tree.

    Attributes:
        tokens: `[B, max_depth+1]` emitted tokens, -1 after the last.
        path: `[B, max_depth+1]` row in the block at each step of the walk (0 is the root).
        num_emitted: `[B]` accepted length.
        last_node: `[B]` row in the block of the node where the walk stopped.
    """

    tokens: np.ndarray
    path: np.ndarray
    num_emitted: np.ndarray
    last_node: np.ndarray

    def moves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The KV moves, each column `[M]`: request, row in the block where an accepted row is, row where it belongs."""
        wanted = np.arange(self.path.shape[1])
        accepted = wanted < self.num_emitted[:, None]
        request, place = np.nonzero(accepted & (self.path != wanted))
        return request, self.path[request, place], place


@dataclass
class ChosenMasks:
    """The mask rows of a step whose logits give candidates for the next blocks.

    Attributes:
        depths: `[B]` depths that have one.
        rows: `[B, max_depth]` row of the step that predicts depth d+1, -1 if none.
    """

    depths: np.ndarray
    rows: np.ndarray

    def by_depth(
        self,
        # [number of rows >= 0, ...]
        of_rows: np.ndarray,
    ) -> np.ndarray:
        """`[B, max_depth, ...]` values of the chosen mask rows by the depth they predict; zero where it has none."""
        spread = np.zeros((*self.rows.shape, *of_rows.shape[1:]), dtype=of_rows.dtype)
        spread[self.rows >= 0] = of_rows
        return spread


def fill_blocks(
    table: TemplateTable,
    # [B] line of each next block, of no more depths than have candidates; NO_BLOCK for none
    line: np.ndarray,
    # [B, depths, ranks that the lines use] candidates
    tokens: np.ndarray,
    first_mask_id: int,
) -> list[list[int]]:
    """Return each request's draft tokens: candidates in the order of the template's nodes, then mask ids.

    A request without a block has none.
    """
    depth, rank = table.depth[line, 1:], table.rank[line, 1:]
    mask_index = table.mask_index[line, 1:]
    is_node = rank >= 0
    request = np.arange(len(line))[:, None]
    block = np.where(
        is_node,
        tokens[request, np.where(is_node, depth - 1, 0), np.where(is_node, rank, 0)],
        first_mask_id + mask_index,
    )
    num_drafts = np.where(line >= 0, table.num_rows[line] - 1, 0)
    return [row[:n] for row, n in zip(block.tolist(), num_drafts.tolist(), strict=True)]

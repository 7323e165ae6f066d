"""The choice of a template for each request's next block, among those of a set, by the masks' confidence.

A candidate's probability in its mask row is taken for its acceptance, corrected where the token before it is a lower
candidate (`promise_weight`). Each template of the set then promises a number of tokens. The block takes the template
that promises most:

    promise = sum over nodes of P(node is reached) * worth(node) * news(node)
    worth(node) = 1 token + value(predictions left after a walk that stops at the node)
                          - value(predictions left after a walk that stops at its parent)
    news(node)  = 1, but for a copied token P(the masks' nodes at its depth are not reached), taken as independent

It is torch code with fixed shapes and no host sync, as the logits are on the device.
"""

from __future__ import annotations

import numpy as np
import torch

from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.markov import promise_weight, state_values
from bita_vllm.tree.shape import TreeBatch


class LineChoice:
    """The choice among the lines of a ladder's template table.

    Attributes:
        num_templates: of each set.
        mask_depths: depths of each set that masks fill.
        max_depth: deepest draft node.
    """

    def __init__(
        self,
        ladder: Ladder,
        # [ages, 2, k, ranks]
        acceptance: np.ndarray,
        device: torch.device,
    ) -> None:
        sets, table = ladder.template_sets, ladder.table
        num_lines, num_nodes = len(table.num_nodes), table.max_nodes
        is_draft = table.rank[:, :num_nodes] >= 0
        parent, depth, rank = (
            np.where(is_draft, column[:, :num_nodes], 0).astype(np.int64)
            for column in (table.parent, table.depth, table.rank)
        )
        weight = np.zeros((num_lines, num_nodes), dtype=np.float32)
        is_copy = rank == table.max_rank
        # [lines, nodes, mask depths] correction of a mask's node at that depth, 0 elsewhere
        at_depth = np.zeros((num_lines, num_nodes, int(table.mask_depths.max()) + 1), np.float32)
        most = max(len(one.templates) for one in sets)
        deepest = int(table.mask_depths.max())
        lines = np.zeros((len(sets), deepest + 1, most), dtype=np.int64)
        first = 0
        for index, one in enumerate(sets):
            # Sets with fewer templates repeat their first one.
            own = np.full(most, first)
            own[: len(one.templates)] += np.arange(len(one.templates))
            depths_of_line = np.minimum(np.arange(deepest + 1)[:, None], table.mask_depths[own])
            lines[index] = table.first_line[own] + depths_of_line
            value = state_values(TreeBatch.of([one.first.shape]), acceptance)
            for start, template in zip(table.first_line[own].tolist(), one.templates, strict=False):
                shape = TreeBatch.of([template.shape])
                whole = promise_weight(shape, value, acceptance)[0]
                often = promise_weight(shape, np.zeros_like(value), acceptance)[0]
                for depths in range(template.mask_depth + 1):
                    kept = template.kept_nodes(depths)
                    line = start + depths
                    weight[line, : len(kept)] = whole[kept]
                    by_masks = np.flatnonzero((rank[line] < table.max_rank) & is_draft[line])
                    at_depth[line, by_masks, depth[line, by_masks] - 1] = often[kept[by_masks]]
            first += len(one.templates)
        # 1, 2, 4, ... nodes up; the root is its own parent
        levels = (table.max_depth - 1).bit_length()
        ancestors = np.zeros((levels, num_lines, num_nodes), dtype=np.int64)
        ancestor = parent
        for level in range(len(ancestors)):
            ancestors[level] = ancestor
            ancestor = np.take_along_axis(ancestor, ancestor, axis=1)
        self.num_templates = tuple(len(one.templates) for one in sets)
        self.mask_depths = tuple(one.mask_depth for one in sets)
        self.max_depth = table.max_depth
        self.has_copies = bool(is_copy.any())
        # the last depth, where no mask's node is: nothing is taken from what is reached
        beside = np.where(is_copy & (depth < at_depth.shape[2]), depth, at_depth.shape[2]) - 1
        (
            self.lines,
            self.is_draft,
            self.weight,
            self.place,
            self.rank,
            self.parent,
            self.beside,
            self.at_depth,
            self.ancestors,
        ) = (
            torch.from_numpy(column).to(device)
            for column in (
                lines,  # [sets, mask depths + 1, templates]
                is_draft,  # [lines, nodes], and the next five
                weight,
                np.maximum(depth - 1, 0),
                rank,
                parent,
                beside,
                at_depth,
                ancestors,  # [log2 of max_depth, lines, nodes]
            )
        )

    def __call__(
        self,
        index: int,
        # [B] int, depths that have candidates; of more than the set's, the set's count
        depths: torch.Tensor,
        # [B, one depth or more, the set's ranks or more] P(candidate of rank r at depth d+1); anything
        # where there are none
        chance: torch.Tensor,
    ) -> torch.Tensor:
        """`[B]` int64, line of the table for each request's next block: one of set `index`, or of its first."""
        lines = self.lines[index][
            depths.long().clamp(max=self.mask_depths[index])
        ]  # [B, templates]
        if self.num_templates[index] == 1:
            return lines[:, 0]
        flat = chance.flatten(1)[:, None].expand(-1, lines.shape[1], -1)
        place = self.place[lines] * chance.shape[2] + self.rank[lines]
        accepted = torch.where(self.is_draft[lines], flat.gather(2, place), 1.0)
        reach = accepted  # of a path of 1, 2, 4, ... nodes
        for ancestor in self.ancestors:
            reach = reach * reach.gather(2, ancestor[lines])
        brings = reach * self.weight[lines]
        if self.has_copies:
            by_masks = (reach[:, :, None] @ self.at_depth[lines])[:, :, 0]  # [B, templates, depths]
            brings = brings * (1 - by_masks.clamp(max=1.0).gather(2, self.beside[lines]))
        promise = brings.sum(dim=-1)
        return lines.gather(1, promise.argmax(dim=1, keepdim=True))[:, 0]

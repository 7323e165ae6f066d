"""What the choice among the trees of a set needs on the device: lines, nodes' paths, nodes' worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ChoiceTable:
    """The choice of `bita_vllm.tree.choice`, laid out for a kernel.

        promise of a line = sum over its nodes of weight * reach * news
        reach = product over the node and its ancestors of P(candidate)
        news = 1, but for a copied token 1 - min(sum over masks' nodes at its depth of correction * reach, 1)

    Attributes:
        lines: `[sets, mask_depth + 1, T]` int32, line of each template of a set, by the depths that have candidates.
        places: `[max_depth, lines, nodes]` int32: where a node (first) and its ancestors, nearest first, find their
            probability among `[max_depth, num_ranks]`; -1 for the root, whose factor is 1.
        weight: `[lines, nodes]` fp32, 0 in padding.
        correction: `[lines, nodes]` fp32, of masks' nodes, 0 elsewhere.
        num_templates: templates of each set.
        mask_depths: depth of each set's deepest draft node that masks fill.
    """

    lines: torch.Tensor
    places: torch.Tensor
    weight: torch.Tensor
    correction: torch.Tensor
    num_templates: tuple[int, ...]
    mask_depths: tuple[int, ...]

    @classmethod
    def of(cls, choice: Any, num_ranks: int, device: torch.device | str) -> ChoiceTable:
        """Copy a `bita_vllm.tree.choice.LineChoice` to the device; `num_ranks` is the tree table's."""
        own = torch.where(choice.is_draft, choice.place * num_ranks + choice.rank, -1)
        places = [own]
        for _ in range(choice.max_depth - 1):
            places.append(places[-1].gather(1, choice.parent))
        return cls(
            choice.lines.int().to(device),
            torch.stack(places).int().to(device),
            choice.weight.to(device),
            choice.at_depth.sum(dim=-1).to(device),  # of the node's own depth
            choice.num_templates,
            choice.mask_depths,
        )

    @property
    def mask_depth(self) -> int:
        """Depth of the deepest draft node that masks fill, over all sets."""
        return self.lines.shape[1] - 1

    @property
    def num_nodes(self) -> int:
        """Nodes of the longest line."""
        return self.weight.shape[1]

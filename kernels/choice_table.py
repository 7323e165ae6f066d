"""What the choice among the trees of a set needs on the device: lines, nodes' paths, nodes' worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ChoiceTable:
    """The choice of `bita_vllm.tree.choice`, laid out for a kernel.

        promise of a line = sum over its nodes of weight * product over the node and its ancestors of P(candidate)

    Attributes:
        lines: `[sets, max_depth + 1, T]` int32, line of each template of a set, by the depths that have candidates.
        places: `[max_depth, lines, nodes]` int32: where a node (first) and its ancestors, nearest first, find their
            probability among `[max_depth, max_rank]`; -1 for the root, whose factor is 1.
        weight: `[lines, nodes]` fp32, 0 in padding.
        num_templates: templates of each set.
        mask_depths: depth of each set's deepest draft node.
    """

    lines: torch.Tensor
    places: torch.Tensor
    weight: torch.Tensor
    num_templates: tuple[int, ...]
    mask_depths: tuple[int, ...]

    @classmethod
    def of(cls, choice: Any, max_rank: int, device: torch.device | str) -> ChoiceTable:
        """Copy a `bita_vllm.tree.choice.LineChoice` to the device; `max_rank` is the tree table's."""
        own = torch.where(choice.is_draft, choice.place * max_rank + choice.rank, -1)
        places = [own]
        for _ in range(choice.max_depth - 1):
            places.append(places[-1].gather(1, choice.parent))
        return cls(
            choice.lines.int().to(device),
            torch.stack(places).int().to(device),
            choice.weight.to(device),
            choice.num_templates,
            choice.mask_depths,
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the longest line."""
        return self.weight.shape[1]

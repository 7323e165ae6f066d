"""The specification of `build_block`: the same arguments, in torch, one request after the other."""

from __future__ import annotations

import torch

from .build_block import PADDING_TOKEN
from .candidates import Candidates
from .choice_table import ChoiceTable
from .tree_table import TreeTable


def build_block_naive(
    candidates: Candidates,
    slots: torch.Tensor,
    first_mask_id: int,
    table: TreeTable,
    choice: ChoiceTable,
    set_index: int,
    draft_tokens: torch.Tensor,
    line_of_slot: torch.Tensor,
) -> None:
    """As `build_block`."""
    draft_tokens.fill_(PADDING_TOKEN)
    for request, slot in enumerate(slots.tolist()):
        most = min(choice.mask_depths[set_index], candidates.tokens.shape[1])
        available = min(int(candidates.depths[request]), most)
        lines = choice.lines[set_index, available].tolist()[: choice.num_templates[set_index]]
        line = lines[0]
        if candidates.tokens.shape[1]:
            chance = candidates.chance[request]
            line = lines[int(promises_of(lines, chance, table, choice).argmax())]
        line_of_slot[slot] = line
        for row in range(1, table.num_rows):
            rank, mask_index = int(table.rank[line, row]), int(table.mask_index[line, row])
            if rank >= 0:
                depth = int(table.depth[line, row])
                draft_tokens[request, row - 1] = candidates.tokens[request, depth - 1, rank]
            elif mask_index >= 0:
                draft_tokens[request, row - 1] = first_mask_id + mask_index


def promises_of(
    lines: list[int],
    # [depths, ranks]
    chance: torch.Tensor,
    table: TreeTable,
    choice: ChoiceTable,
) -> torch.Tensor:
    """`[len(lines)]` what each line promises (`ChoiceTable`)."""
    one = chance.new_ones(1)  # place -1: the root's factor
    factors = torch.cat([chance.flatten(), one])[choice.places[:, lines].long()]
    reach = factors.prod(dim=0)
    rank, depth = (column[lines, : choice.num_nodes] for column in (table.rank, table.depth))
    beside = depth[:, :, None] == depth[:, None]  # [lines, nodes, nodes]
    by_masks = (beside * (reach * choice.correction[lines])[:, None]).sum(dim=-1)
    news = torch.where(rank == table.max_rank, 1 - by_masks.clamp(max=1), 1.0)
    return (reach * choice.weight[lines] * news).sum(dim=-1)

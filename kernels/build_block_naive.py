"""The specification of `build_block`: the same arguments, in torch, one request after the other."""

from __future__ import annotations

import torch

from .build_block import PADDING_TOKEN
from .choice_table import ChoiceTable
from .rank_tokens import Ranking
from .tree_table import TreeTable


def build_block_naive(
    logits: torch.Tensor | None,
    logits_rows: torch.Tensor,
    depths: torch.Tensor,
    slots: torch.Tensor,
    first_mask_id: int,
    table: TreeTable,
    choice: ChoiceTable,
    set_index: int,
    ranking: Ranking,
    draft_tokens: torch.Tensor,
    line_of_slot: torch.Tensor,
) -> None:
    """As `build_block`; the scratch memory is not used."""
    draft_tokens.fill_(PADDING_TOKEN)
    for request, slot in enumerate(slots.tolist()):
        candidates, available = torch.zeros(0, 1), 0
        if logits is not None:
            available = min(int(depths[request]), choice.max_depths[set_index])
            candidates = logits[logits_rows[request, :available]]
        lines = choice.lines[set_index, available].tolist()[: choice.num_templates[set_index]]
        line = lines[0]
        # A stable sort keeps equal logits in the order of their ids; NaN sorts as the greatest.
        order = torch.sort(candidates, dim=-1, descending=True, stable=True).indices
        if available:
            probabilities = candidates.float().softmax(dim=-1).gather(1, order)
            promises = promises_of(lines, probabilities[:, : table.max_rank], choice)
            line = lines[int(promises.argmax())]
        line_of_slot[slot] = line
        for row in range(1, table.num_rows):
            rank, mask_index = int(table.rank[line, row]), int(table.mask_index[line, row])
            if rank >= 0:
                draft_tokens[request, row - 1] = order[int(table.depth[line, row]) - 1, rank]
            elif mask_index >= 0:
                draft_tokens[request, row - 1] = first_mask_id + mask_index


def promises_of(
    lines: list[int],
    # [depths, ranks]
    probabilities: torch.Tensor,
    choice: ChoiceTable,
) -> torch.Tensor:
    """`[len(lines)]` what each line promises (`ChoiceTable`)."""
    one = torch.ones(1)  # place -1: the root's factor
    factors = torch.cat([probabilities.flatten(), one])[choice.places[:, lines].long()]
    return (factors.prod(dim=0) * choice.weight[lines]).sum(dim=-1)

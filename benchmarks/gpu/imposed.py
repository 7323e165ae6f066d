"""Accepted lengths of a trained adapter on a model without weights.

A model of random weights accepts nothing, so its throughput would say nothing. Here every step is the real
one, except that the walk compares drafts with other targets: a child is the target's token where its rank is
the one that a trained adapter's mask gave to the answer's token, in answers that were recorded once
(tests/data/answer_ranks.npz). It costs some ten small launches a step, which plain vLLM does not have.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch


def imposed_targets(
    # [num targets] int32 or int64, the model's own
    targets: torch.Tensor,
    # [rows of the step] int32 or int64
    row_tokens: torch.Tensor,
    # [B] int32, where each root's target lies
    first_target: torch.Tensor,
    # [B] int32
    first_row: torch.Tensor,
    # [B] int32
    num_rows: torch.Tensor,
    # [B] int32, line of the table, -1 without a block
    line: torch.Tensor,
    # [lines, R] int32, -1 where there is none
    parent: torch.Tensor,
    # [lines, R] int32, rank of a draft node among its parent's candidates
    rank: torch.Tensor,
    # [lines, R] int32
    depth: torch.Tensor,
    # [lines, R] int32, -1 in node rows
    mask_index: torch.Tensor,
    # [B, depths] int32, rank of the answer's token at each depth
    wanted: torch.Tensor,
) -> torch.Tensor:
    """`[num targets]`: at every node the token of its child of the wanted rank, else one that no child holds."""
    at = line.clamp(min=0).long()
    places = torch.arange(parent.shape[1], device=line.device)
    child = (line >= 0)[:, None] & (places < num_rows[:, None])
    child &= (parent[at] >= 0) & (mask_index[at] < 0) & (depth[at] <= wanted.shape[1])
    tokens = row_tokens[(first_row.long()[:, None] + places).clamp(max=len(row_tokens) - 1)]
    # Next to the lowest or highest draft token: no child of the request holds it.
    lowest = torch.where(child, tokens, 2**31 - 1).amin(dim=1, keepdim=True)
    highest = torch.where(child, tokens, -1).amax(dim=1, keepdim=True)
    miss = torch.where(lowest > 0, lowest - 1, highest + 1)
    own = first_target.long()[:, None] + parent[at].clamp(min=0).long()
    last = len(targets)  # a place for what is nobody's target
    result = torch.cat([targets, targets.new_zeros(1)])
    result.scatter_(
        0, torch.where(child, own, last).flatten(), miss.expand_as(own).flatten().to(targets.dtype)
    )
    right = wanted.gather(1, (depth[at] - 1).clamp(0, wanted.shape[1] - 1).long()) == rank[at]
    hit = torch.where(child & right, own, last)
    return result.scatter_(0, hit.flatten(), tokens.flatten().to(targets.dtype))[:last]


MOST_REQUESTS = 4096


class Imposing:
    """`accept_tree` with targets of recorded answers; every request reads on where its last walk stopped.

    So that what is hard to predict comes together, as in an answer. Requests go by their place in the batch:
    one that moves up goes on in another's answer, which changes nothing on average.
    """

    def __init__(self, accept_tree: Callable[..., None], ranks: torch.Tensor) -> None:
        """`ranks` is `[places, depths]` int32, on the host."""
        self._accept_tree, self._ranks = accept_tree, ranks
        self._signature = inspect.signature(accept_tree)
        self._on_device: torch.Tensor | None = None
        self._places = torch.arange(MOST_REQUESTS) * 997  # far apart in the answers
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As accept_tree."""
        given = self._signature.bind(*args, **kwargs).arguments
        table, line = given["table"], given["line"]
        if self._on_device is None:
            self._on_device = self._ranks.to(line.device)
            self._places = self._places.to(line.device)
        places = self._places[: len(line)]
        given["target_tokens"] = imposed_targets(
            given["target_tokens"],
            given["row_tokens"],
            given["first_target"],
            given["first_row"],
            given["num_rows"],
            line,
            table.parent,
            table.rank,
            table.depth,
            table.mask_index,
            self._on_device[places % len(self._ranks)],
        )
        self.calls += 1
        self._accept_tree(**given)
        places += given["num_emitted"]


def install(llm: Any) -> Callable[[], None]:
    """Impose recorded acceptance on a bita engine of this process; returns what undoes it.

    Raises RuntimeError if no module of the runner calls the walk.
    """
    import numpy as np
    from bita_kernels.accept_tree import accept_tree
    from testbed.recorded_ranks import recorded_ranks

    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("bita_vllm.") and getattr(module, "accept_tree", None) is accept_tree
    ]
    if not modules:
        raise RuntimeError("nothing in bita_vllm calls accept_tree, so acceptance is not imposed")
    imposing = Imposing(accept_tree, torch.from_numpy(np.concatenate(recorded_ranks("mt_bench"))))

    def put(function: Any) -> None:
        for module in modules:
            module.accept_tree = function  # type: ignore[attr-defined]

    put(imposing)
    return lambda: put(accept_tree)

"""Masks as a source of drafts on the V2 runner: top tokens of the mask rows under the node where a walk stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bita_kernels.candidates import Candidates
from bita_kernels.rank_tokens import Ranking, rank_tokens

from bita_vllm.runner.gpu_logits import parts_of
from bita_vllm.runner.gpu_step import GPUStep
from bita_vllm.step.device import StepTrees


class GPUMasks:
    """A `GPUSource` (sources.py): candidates as deep as a step's mask groups reach from where its walks stopped."""

    def __init__(
        self,
        # [n, H] -> [n, V]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        trees: StepTrees,
        req_states: Any,
        vocab_size: int,
        # where they go, of as many depths and ranks as masks fill; None: a buffer of their own
        into: Candidates | None = None,
    ) -> None:
        self.compute_logits, self._trees, self._vocab_size = compute_logits, trees, vocab_size
        # Wherever there are sets, so that no request is the first to compile it.
        self._chances = max(trees.choice.num_templates) > 1
        table, max_num_reqs = trees.table, len(trees.next_depths)
        sizes = trees.choice.mask_depth, table.max_rank, table.device
        self.ranking = Ranking.of(max_num_reqs, vocab_size, *sizes)
        self.arrived = self.ranking.arrived  # kept through sleep, as launches count from 0
        into = into or Candidates.empty(max_num_reqs, *sizes)
        self.candidates = replace(into, depths=trees.next_depths)

    def __call__(
        self,
        step: GPUStep,
        # [rows, H]
        hidden_states: torch.Tensor,
        set_index: int,
    ) -> Candidates:
        """Rank the logits of the chosen mask rows: those that came with the nodes', else those of a pass now."""
        trees, everyone = self._trees, slice(0, step.batch.num_reqs)
        candidates, depth = self.candidates.of(everyone), trees.choice.mask_depth
        if not step.has_blocks:
            return candidates.none()
        if step.logits is not None:
            self._rank(step.logits, trees.mask_rows[everyone, :depth], set_index, candidates)
            return candidates
        for part in parts_of(everyone.stop, depth, self._vocab_size):
            rows = trees.candidate_rows(part, set_index)
            # -1, where a request has fewer candidates, takes the last row: nobody looks at its logits.
            logits = self.compute_logits(hidden_states[rows].flatten(0, 1))
            places = trees.candidate_places(part, set_index)
            self._rank(logits, places, set_index, candidates.of(part))
        return candidates

    def _rank(
        self,
        # [number of rows, V]
        logits: torch.Tensor,
        # [requests, mask_depth] int64
        logits_rows: torch.Tensor,
        set_index: int,
        # output, of these requests
        candidates: Candidates,
    ) -> None:
        most_depths = self._trees.choice.mask_depths[set_index]
        rank_tokens(logits, logits_rows, most_depths, self._chances, self.ranking, candidates)

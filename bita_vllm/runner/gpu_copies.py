"""Copies of text already seen as a source of drafts on the V2 runner, beside masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bita_kernels.candidates import Candidates
from bita_kernels.copy_rules import MAX_COPIES
from bita_kernels.find_copies import CopyState, find_copies

from bita_vllm.runner.gpu_masks import GPUMasks
from bita_vllm.runner.gpu_step import GPUStep
from bita_vllm.step.device import StepTrees


class GPUMasksAndCopies:
    """A `GPUSource` (sources.py): candidates of masks and, in the rank after theirs, copies.

    The texts are vLLM's own, where drafts are made with the step's tokens in them, and in the host's memory, which the
    device reads.
    """

    def __init__(
        self,
        # [n, H] -> [n, V]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        trees: StepTrees,
        req_states: Any,
        vocab_size: int,
    ) -> None:
        table, max_num_reqs = trees.table, len(trees.next_depths)
        sizes = max(table.max_depth, MAX_COPIES), table.num_ranks, table.device
        self.candidates = Candidates.empty(max_num_reqs, *sizes)
        masks_own = self.candidates.within(trees.choice.mask_depth, slice(table.max_rank))
        self._masks = GPUMasks(compute_logits, trees, req_states, vocab_size, masks_own)
        self._req_states, self._rank = req_states, table.max_rank
        self._state = CopyState.empty(max_num_reqs, req_states.max_model_len, table.device)
        # Kept through sleep.
        self.arrived, self.no_depths = self._masks.arrived, self.candidates.depths
        self.last, self.evidence = self._state.last, self._state.evidence

    def __call__(
        self,
        step: GPUStep,
        # [rows, H]
        hidden_states: torch.Tensor,
        set_index: int,
    ) -> Candidates:
        """Rank the chosen mask rows, and look the last tokens of every request up in its own text."""
        everyone = slice(0, step.batch.num_reqs)
        candidates = self.candidates.of(everyone)
        masks = self._masks(step, hidden_states, set_index)
        find_copies(
            self._req_states.all_token_ids.gpu,
            self._req_states.total_len.gpu,
            step.batch.idx_mapping,
            self._state,
            candidates.tokens[:, :MAX_COPIES, self._rank],
            candidates.chance[:, :MAX_COPIES, self._rank],
        )
        # The depths that have candidates of masks: none after a step without blocks.
        return replace(candidates, depths=masks.depths) if step.has_blocks else candidates

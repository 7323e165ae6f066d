"""Masks as a source of drafts on the CPU runner: top tokens of the mask rows under the node where a walk stopped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from bita_kernels.candidates import Candidates
from vllm.config import VllmConfig

from bita_vllm.runner.cpu_step import CPUStep
from bita_vllm.tree.template_set import TemplateSet


class CPUMasks:
    """A `CPUSource` (sources.py): candidates as deep as a step's mask groups reach from where its walks stopped."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        # [n, H] -> [n, V]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        del vllm_config
        self.compute_logits = compute_logits

    def __call__(
        self,
        step: CPUStep,
        # [rows, H]
        hidden_states: torch.Tensor,
        templates: TemplateSet,
    ) -> Candidates:
        """Read the top tokens of the chosen mask rows' logits: those that came with the nodes', else computed now."""
        blocks, walk = step.blocks, step.walk
        if blocks is None or walk is None:
            return _none(step, templates)
        masks = blocks.chosen_masks(walk, templates.mask_depth)
        rows = masks.rows[masks.rows >= 0]
        if not len(rows):
            return _none(step, templates)
        if step.mask_logits is not None:
            logits = step.mask_logits
            places = torch.from_numpy(np.searchsorted(blocks.mask_rows(), rows))
        else:
            logits = self.compute_logits(hidden_states[torch.from_numpy(rows)])
            places = torch.arange(len(rows))
        of_rows = torch.ops.bita.top_tokens_cpu(logits, places, templates.max_rank)
        tokens, chance = (torch.from_numpy(masks.by_depth(each.numpy())) for each in of_rows)
        return Candidates(tokens, chance, torch.from_numpy(masks.depths))


def _none(step: CPUStep, templates: TemplateSet) -> Candidates:
    return Candidates.empty(step.batch.num_reqs, templates.mask_depth, templates.max_rank, "cpu")

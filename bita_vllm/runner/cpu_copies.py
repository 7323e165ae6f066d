"""Copies of text already seen as a source of drafts on the CPU runner, alone and beside masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bita_kernels.candidates import Candidates
from vllm.config import VllmConfig

from bita_vllm.runner.cpu_masks import CPUMasks
from bita_vllm.runner.cpu_step import CPUStep
from bita_vllm.step.copies import CopyIndex
from bita_vllm.step.settings import get_settings
from bita_vllm.tree.template_set import TemplateSet


class CPUCopies:
    """A `CPUSource` (sources.py): the tokens that followed where a request's last tokens occurred before.

    They have the rank after the masks' own, as templates' nodes for copied tokens do.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        # [n, H] -> [n, V]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        del compute_logits  # copies need none
        settings = get_settings(vllm_config)
        assert settings is not None
        self._rank = settings.ladder.table.max_rank
        most = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        self._index = CopyIndex(*most)

    def __call__(
        self,
        step: CPUStep,
        # [rows, H]
        hidden_states: torch.Tensor,
        templates: TemplateSet,
    ) -> Candidates:
        """Look the last tokens of every request up in its own text."""
        batch, num_requests = step.batch, step.batch.num_reqs
        tokens, chance = self._index(
            batch.req_ids, batch.token_ids_cpu_tensor, batch.num_tokens_no_spec[:num_requests]
        )
        found = Candidates.empty(num_requests, tokens.shape[1], self._rank + 1, "cpu")
        found.tokens[..., self._rank] = torch.from_numpy(tokens)
        found.chance[..., self._rank] = torch.from_numpy(chance)
        return found


class CPUMasksAndCopies:
    """A `CPUSource`: candidates of masks, and copies beside them."""

    def __init__(
        self, vllm_config: VllmConfig, compute_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._masks = CPUMasks(vllm_config, compute_logits)
        self._copies = CPUCopies(vllm_config, compute_logits)

    def __call__(
        self, step: CPUStep, hidden_states: torch.Tensor, templates: TemplateSet
    ) -> Candidates:
        """Both sources' candidates; those of masks say which depths have some."""
        masks = self._masks(step, hidden_states, templates)
        both = self._copies(step, hidden_states, templates)
        depths, ranks = masks.tokens.shape[1:]
        both.tokens[:, :depths, :ranks] = masks.tokens
        both.chance[:, :depths, :ranks] = masks.chance
        return Candidates(both.tokens, both.chance, masks.depths)

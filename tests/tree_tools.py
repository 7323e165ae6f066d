"""What tests ask of trees: expectations of one template, sets and ladders of a few, probabilities for a choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bita_vllm.tree import Template
from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder
from bita_vllm.tree.markov import LongRun
from bita_vllm.tree.search import acceptance_table, evaluate
from bita_vllm.tree.template_set import TemplateSet


def expected_length(template: Template, acceptance: Mapping[str, Any] | None = None) -> float:
    """Expected accepted length in the long run (tokens per step and request), for an adapter's statistics."""
    table = acceptance_table(acceptance, template.num_masks)
    return float(long_run_of(template, table).accepted_length[0])


def long_run_of(
    template: Template,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> LongRun:
    """Expectations of one template, each `[1]`."""
    return evaluate([template.shape], acceptance)


def ladder_of(sets: Sequence[TemplateSet]) -> Ladder:
    """These sets, of ascending widths; its table from batch size to width is not looked at."""
    return Ladder(sets, [(1, 1, PLAIN_WIDTH)])


def sets_of_one(templates: Iterable[Template]) -> tuple[TemplateSet, ...]:
    """Each template in a set of its own."""
    return tuple(TemplateSet((template,)) for template in templates)


def probabilities_of(
    # [rows, ranks]
    top: torch.Tensor,
    # [rows, V]
    logits: torch.Tensor,
) -> torch.Tensor:
    """`[rows, ranks]` fp32 probability of each row's top logits."""
    return (top.double() - logits.double().logsumexp(dim=-1, keepdim=True)).exp().float()

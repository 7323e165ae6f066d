"""From acceptance and cost to a ladder: for each batch size the template with most expected tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bita_vllm.ladder import PLAIN_WIDTH, Ladder
from bita_vllm.tree import Template
from bita_vllm.tree_search import best_templates, long_run_of
from bita_vllm.tuning.cost import StepCost

BUDGETS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
# Expected gain below which plain decoding is kept: what prediction and measurement may be wrong by.
MIN_GAIN = 0.03


@dataclass(frozen=True)
class Choice:
    """What is expected of one batch size.

    Attributes:
        batch_size: requests in a step.
        width: R-1 of the template, 0 for plain decoding.
        accepted_length: tokens a request gets a step.
        seconds: of a step.
        gain: tokens a second over plain decoding's.
    """

    batch_size: int
    width: int
    accepted_length: float
    seconds: float
    gain: float


def choose_ladder(
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    cost: StepCost,
    max_batch_size: int,
    *,
    context: float = 512.0,
    padded: bool = False,
    budgets: Sequence[int] = BUDGETS,
    min_gain: float = MIN_GAIN,
    provenance: dict[str, Any] | None = None,
) -> tuple[Ladder, list[Choice]]:
    """The ladder, and what is expected of each batch size from 1 to `max_batch_size`.

    Args:
        acceptance: as `tree_search.acceptance_table` makes it.
        cost: of a step on the machine.
        max_batch_size: larger ones take its width.
        context: mean context of a request, in tokens.
        padded: blocks always have R rows (GPU), not only those that candidates are there for (CPU).
        budgets: rows of the templates to choose from.
        min_gain: a template has to promise so much more than plain decoding.
        provenance: stored in the ladder.
    """
    expected = [
        (
            template,
            float(run.accepted_length[0]),
            template.num_rows if padded else float(run.rows[0]),
        )
        for template in best_templates(budgets, acceptance)
        for run in [long_run_of(template, acceptance)]
    ]
    choices = [_choose(expected, cost, n, context, min_gain) for n in range(1, max_batch_size + 1)]
    templates = {
        template.num_rows - 1: template
        for template, _, _ in expected
        if any(choice.width == template.num_rows - 1 for choice in choices)
    }
    if not templates:  # plain at every batch size; a ladder names a template even so
        templates = {expected[0][0].num_rows - 1: expected[0][0]}
    ranges: list[tuple[int, int, int]] = []
    for choice in choices:
        n, width = choice.batch_size, choice.width
        if ranges and ranges[-1][2] == width:
            ranges[-1] = (ranges[-1][0], n, width)
        else:
            ranges.append((n, n, width))
    return Ladder(templates, ranges, provenance or {}), choices


def _choose(
    expected: list[tuple[Template, float, float]],
    cost: StepCost,
    num_requests: int,
    context: float,
    min_gain: float,
) -> Choice:
    plain = cost.seconds(num_requests, num_requests, context)
    best = Choice(num_requests, PLAIN_WIDTH, 1.0, plain, 1.0)
    for template, length, rows in expected:
        seconds = cost.seconds(num_requests, num_requests * rows, context)
        gain = length * plain / seconds
        if gain > max(best.gain, 1 + min_gain):
            best = Choice(num_requests, template.num_rows - 1, length, seconds, gain)
    return best

"""From acceptance and cost to a ladder: for each batch size the template with most expected tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder, ranges_of
from bita_vllm.tree.search import best_templates, evaluate
from bita_vllm.tree.step_cost import MeasuredCost, StepCost
from bita_vllm.tree.template_set import TemplateSet

BUDGETS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
# Expected gain below which plain decoding is kept: what acceptance may be wrong by. What the seconds may be wrong by
# counts where it is more.
MIN_GAIN = 0.03
PLAIN = -1  # no template


@dataclass(frozen=True)
class Choice:
    """What is expected of one batch size.

    Attributes:
        batch_size: requests in a step.
        width: R-1 of the template, 0 for plain decoding.
        accepted_length: tokens a request gets a step.
        seconds: of a step.
        gain: tokens a second over plain decoding's.
        spread: how far the gain may be off, relative to it, for what was measured: seconds and accepted length.
    """

    batch_size: int
    width: int
    accepted_length: float
    seconds: float
    gain: float
    spread: float


def choose_ladder(
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    cost: StepCost,
    max_batch_size: int,
    *,
    context: float = 512.0,
    padded: bool = False,
    budgets: Sequence[int] = BUDGETS,
    sets: Mapping[int, TemplateSet] | None = None,
    min_gain: float = MIN_GAIN,
    most_rows: float = np.inf,
    length_spread: float = 0.0,
    provenance: dict[str, Any] | None = None,
) -> tuple[Ladder, list[Choice]]:
    """The ladder, and what is expected of each batch size from 1 to `max_batch_size`.

    Args:
        acceptance: as `tree.search.acceptance_table` makes it.
        cost: of a step on the machine.
        max_batch_size: larger ones take its width.
        context: mean context of a request, in tokens.
        padded: blocks always have R rows (GPU), not only those that candidates are there for (CPU).
        budgets: rows of the templates to choose from.
        sets: by row budget, where blocks are to choose among several trees.
        min_gain: a template has to promise so much more than plain decoding.
        most_rows: of a step with blocks, over all requests.
        length_spread: how far accepted lengths may be off, relative to them.
        provenance: stored in the ladder.
    """
    candidates = sets_of_budgets(budgets, acceptance, sets or {})
    run = evaluate([one.first.shape for one in candidates], acceptance)
    lengths = run.accepted_length * np.array([one.gain for one in candidates])
    rows = rows_of(candidates, run.rows, padded)
    batch_sizes = range(1, max_batch_size + 1)
    seconds, plain = step_seconds(cost, rows, batch_sizes, context)
    gains = gains_over_plain(lengths, seconds, plain)
    gains[np.outer(rows, batch_sizes) > most_rows] = 0.0
    spread = np.zeros_like(gains)  # a prediction's is in `min_gain`
    if isinstance(cost, MeasuredCost):
        spread[:] = [[cost.spread(n, n * r) for n in batch_sizes] for r in rows.tolist()]
    spread = np.hypot(spread, length_spread)
    index, gain = fastest(gains, np.maximum(spread, min_gain))
    choices = [
        Choice(n, PLAIN_WIDTH, 1.0, float(plain[n - 1]), 1.0, 0.0)
        if i == PLAIN
        else Choice(
            n,
            candidates[i].first.width,
            float(lengths[i]),
            float(seconds[i, n - 1]),
            float(gain[n - 1]),
            float(spread[i, n - 1]),
        )
        for n, i in zip(batch_sizes, index.tolist(), strict=True)
    ]
    widths = [choice.width for choice in choices]
    by_width = {one.first.width: one for one in candidates}
    # Plain at every batch size: a ladder names a template even so.
    used = set(widths) - {PLAIN_WIDTH} or {candidates[0].first.width}
    return (
        Ladder(
            [by_width[width] for width in used],
            ranges_of(widths),
            provenance or {},
        ),
        choices,
    )


def sets_of_budgets(
    budgets: Sequence[int],
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    saved: Mapping[int, TemplateSet],
) -> list[TemplateSet]:
    """One for each row budget: the saved one, or the best template alone."""
    missing = [budget for budget in budgets if budget not in saved]
    best = dict(zip(missing, best_templates(missing, acceptance) if missing else [], strict=True))
    return [
        saved[budget] if budget in saved else TemplateSet((best[budget],)) for budget in budgets
    ]


def rows_of(
    sets: Sequence[TemplateSet],
    # [T] of each set's first template alone
    alone: np.ndarray,
    padded: bool,
) -> np.ndarray:
    """`[T]` mean rows of a request in a step. Blocks that choose their tree fill their budget."""
    full = np.array([one.first.num_rows for one in sets])
    return np.where([padded or one.has_choice for one in sets], full, alone)


def step_seconds(
    cost: StepCost,
    # [T] mean rows of a request, by template
    rows: np.ndarray,
    batch_sizes: Sequence[int],
    context: float,
) -> tuple[np.ndarray, np.ndarray]:
    """`[T, len(batch_sizes)]` seconds of a step with each template, `[len(batch_sizes)]` of a plain one."""
    seconds = [[cost.seconds(n, n * r, context) for n in batch_sizes] for r in rows.tolist()]
    return np.array(seconds), np.array([cost.seconds(n, n, context) for n in batch_sizes])


def gains_over_plain(
    # [T] accepted length, by template
    lengths: np.ndarray,
    # [T, N] seconds of a step, by template and batch size
    seconds: np.ndarray,
    # [N] seconds of a plain step
    plain: np.ndarray,
) -> np.ndarray:
    """`[T, N]` tokens a second, over plain decoding's."""
    return lengths[:, None] * plain / seconds


def fastest(
    # [T, N] tokens a second, over plain decoding's
    gains: np.ndarray,
    # [T, N], or one for all
    min_gain: np.ndarray | float,
) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` template with most tokens a second, PLAIN where none gains `min_gain`; `[N]` its gain over plain."""
    sure = np.where(gains > 1 + min_gain, gains, 0.0)
    index, gain = sure.argmax(axis=0), sure.max(axis=0)
    return np.where(gain > 0, index, PLAIN), np.where(gain > 0, gain, 1.0)

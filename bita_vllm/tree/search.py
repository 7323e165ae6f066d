"""The best template within a row budget, for given acceptance statistics.

Up to `EXACT_ROWS` rows all templates are compared. From these on templates grow row by row, the best few
of every size being kept (beam search), so one pass serves all budgets; then nodes and mask rows are moved
about as long as that helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from bita_vllm.tree.markov import LongRun, long_run
from bita_vllm.tree.shape import TreeBatch, TreeShape
from bita_vllm.tree.template import Template, TemplateError

# P(rank r of mask j is the token | the tokens before it were accepted), [k][ranks], for adapters that
# bring no statistics. Not measured rank by rank: chosen so that the lengths measured for the first
# adapter on MT-Bench come out (chain of 3 1.445, 3,2,1 1.686, 5,4,3 1.826), decaying smoothly after.
DEFAULT_ACCEPTANCE = (
    (0.37, 0.12, 0.07, 0.045, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
    (0.20, 0.09, 0.055, 0.04, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
    (0.15, 0.07, 0.045, 0.035, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
)
MIN_ROWS = 3  # root, one draft node, one mask row
EXACT_ROWS = 10  # a third of a second; twelve rows take ten times that
BEAM = 6  # templates of each size that growth goes on from
MAX_ROUNDS = 20  # of moves; 1 to 3 are usual
CHUNK = 1 << 21  # values of one array in `evaluate`
GAIN = 1e-9


def best_template(
    num_rows: int, num_masks: int, acceptance: Mapping[str, Any] | None = None
) -> Template:
    """The template of at most `num_rows` rows with the longest expected accepted length.

    Args:
        num_rows: row budget R.
        num_masks: k of the adapter: longest mask group, deepest node.
        acceptance: the adapter's statistics, as `acceptance_table` takes them.

    Raises:
        TemplateError: the budget holds no root, node and mask row, or the statistics are malformed.
    """
    return best_templates([num_rows], acceptance_table(acceptance, num_masks))[0]


def best_templates(
    budgets: Sequence[int],
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> list[Template]:
    """The best template found for each row budget. Raises TemplateError for a budget below 3 rows."""
    if min(budgets) < MIN_ROWS:
        raise TemplateError(
            f"A row budget of {min(budgets)} is too small: root, one draft node and one mask row need {MIN_ROWS} rows "
            "(num_speculative_tokens 2); raise it."
        )
    grown = grow(max(budgets), acceptance)
    return [
        Template.of_shape(
            grown[budget] if budget <= EXACT_ROWS else polish(grown[budget], budget, acceptance)
        )
        for budget in budgets
    ]


def acceptance_table(acceptance: Mapping[str, Any] | None, num_masks: int) -> np.ndarray:
    """`[ages, 2, num_masks, ranks]` from an adapter's statistics (`training.evaluate.acceptance_statistics`).

    Their `conditional_rank_probability`, or, without it, `rank_probability` `[k][ranks]` for every age
    and parent. None: the default, whose last mask is repeated where k is larger.

    Raises:
        TemplateError: not `num_masks` equally long lists of probabilities.
    """
    if acceptance is None:
        last = len(DEFAULT_ACCEPTANCE) - 1
        acceptance = {
            "rank_probability": [DEFAULT_ACCEPTANCE[min(j, last)] for j in range(num_masks)]
        }
    plain = acceptance.get("rank_probability", ())
    given = acceptance.get("conditional_rank_probability", [[plain, plain]])
    try:
        table = np.array(given, dtype=np.float64)[:, :, :num_masks]
        wrong = table.ndim != 4 or table.shape[1:3] != (2, num_masks) or not table.size
    except (ValueError, TypeError, IndexError):
        wrong = True
    if (
        wrong
        or not np.isfinite(table).all()
        or table.min() < 0
        or table.sum(axis=-1).max() > 1 + 1e-5
    ):
        raise TemplateError(
            f"Acceptance statistics must be {num_masks} equally long lists of probabilities by rank, each summing "
            f"to at most 1; got {len(plain)} lists. Run 'bita eval' to make them."
        )
    return table


def scaled(
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    factor: float,
) -> np.ndarray:
    """`[ages, 2, k, ranks]` acceptance times a factor; the ranks of a mask still sum to at most 1."""
    table = acceptance * factor
    scaled_table: np.ndarray = table / np.maximum(table.sum(axis=-1, keepdims=True), 1.0)
    return scaled_table


def every_shape(num_rows: int, num_masks: int, num_ranks: int) -> Iterator[TreeShape]:
    """All templates of exactly `num_rows` rows whose children have ranks 0, 1, ...

    With acceptance that falls with rank no other template can be better: a node of a lower rank may take
    the place of one that is missing.
    """
    for group, children in _trees(num_rows, num_masks, num_masks, num_ranks):
        if group:
            yield _flat((group, children))


# A node with what hangs under it: length of its mask group, its children by rank.
_Tree = tuple[int, tuple["_Tree", ...]]


@cache
def _trees(rows: int, depth: int, num_masks: int, num_ranks: int) -> tuple[_Tree, ...]:
    """All trees of that many rows, their root's own included, at most `depth` deep."""
    return tuple(
        (group, children)
        for group in range(min(num_masks, rows - 1) + 1)
        for children in _forests(rows - 1 - group, depth, num_masks, num_ranks, num_ranks)
    )


@cache
def _forests(
    rows: int, depth: int, num_masks: int, num_ranks: int, most: int
) -> tuple[tuple[_Tree, ...], ...]:
    if rows == 0:
        return ((),)
    if depth == 0 or most == 0:
        return ()
    return tuple(
        (first, *rest)
        for size in range(1, rows + 1)
        for first in _trees(size, depth - 1, num_masks, num_ranks)
        for rest in _forests(rows - size, depth, num_masks, num_ranks, most - 1)
    )


def _flat(tree: _Tree) -> TreeShape:
    parent, rank, group = [-1], [-1], [tree[0]]
    waiting = [(0, tree)]
    while waiting:
        place, (_, children) = waiting.pop()
        for child_rank, child in enumerate(children):
            waiting.append((len(parent), child))
            parent.append(place)
            rank.append(child_rank)
            group.append(child[0])
    return TreeShape(tuple(parent), tuple(rank), tuple(group))


def grow(
    max_rows: int,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    exact_rows: int = EXACT_ROWS,
) -> dict[int, TreeShape]:
    """For every number of rows from 3 up the best shape found that has at most so many.

    All shapes of up to `exact_rows` rows are compared; larger ones are grown from the best of these.
    """
    num_masks, num_ranks = acceptance.shape[2:]
    # By number of rows: (expected length, shape), best first. Of shapes equally long one is kept.
    levels: dict[int, list[tuple[float, TreeShape]]] = {}
    for rows in range(2, max(exact_rows, MIN_ROWS) + 1):
        levels[rows] = _best_few([], list(every_shape(rows, num_masks, num_ranks)), acceptance)
    best: dict[int, TreeShape] = {}
    longest = 0.0
    for rows in range(2, max_rows + 1):
        level = levels.pop(rows, [])
        if level and level[0][0] > longest + GAIN:
            longest, best[rows] = level[0]
        else:
            best[rows] = best[rows - 1]
        by_size: dict[int, list[TreeShape]] = {}
        for _, start in level:
            for shape in start.grown(num_masks, num_ranks, max_rows):
                by_size.setdefault(shape.num_rows, []).append(shape)
        for size, shapes in by_size.items():
            if size > exact_rows:
                levels[size] = _best_few(levels.get(size, []), shapes, acceptance)
    return best


def _best_few(
    found: list[tuple[float, TreeShape]], more: list[TreeShape], acceptance: np.ndarray
) -> list[tuple[float, TreeShape]]:
    lengths = evaluate(more, acceptance).accepted_length.tolist()
    found = found + list(zip(lengths, more, strict=True))
    by_length = {round(length, 9): (length, shape) for length, shape in found}
    return [by_length[key] for key in sorted(by_length, reverse=True)[:BEAM]]


def polish(shape: TreeShape, max_rows: int, acceptance: np.ndarray) -> TreeShape:
    """Take something away and put something else in its place, as long as that helps."""
    num_masks, num_ranks = acceptance.shape[2:]
    length = evaluate([shape], acceptance).accepted_length[0]
    for _ in range(MAX_ROUNDS):
        moved = [
            again for less in shape.shrunk() for again in less.grown(num_masks, num_ranks, max_rows)
        ]
        lengths = evaluate(moved, acceptance).accepted_length
        if not len(moved) or lengths.max() <= length + GAIN:
            break
        shape, length = moved[int(lengths.argmax())], lengths.max()
    return shape


def evaluate(shapes: Sequence[TreeShape], acceptance: np.ndarray) -> LongRun:
    """Expectations of many shapes, each `[len(shapes)]`."""
    num_nodes = max((len(shape.parent) for shape in shapes), default=1)
    states = 1 << acceptance.shape[2]
    chunk = max(1, CHUNK // (num_nodes * min(states, 64)))
    found = [
        long_run(TreeBatch.of(shapes[start : start + chunk]), acceptance)
        for start in range(0, len(shapes), chunk)
    ]
    return LongRun(
        np.concatenate([np.zeros(0), *(run.accepted_length for run in found)]),
        np.concatenate([np.zeros(0), *(run.rows for run in found)]),
    )

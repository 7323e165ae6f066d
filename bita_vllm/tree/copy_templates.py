"""Templates with a chain of copied tokens, for the sets of a ladder (NumPy only).

A copied node costs one row and needs no mask group. Within a set's row budget a chain takes the place of some of the
masks' nodes and groups; which template a block takes depends on whether there is something to copy, and how sure it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from bita_kernels.copy_rules import MAX_COPIES

from bita_vllm.tree.search import MIN_ROWS, best_templates
from bita_vllm.tree.template import MAX_ROWS, Template
from bita_vllm.tree.template_set import MAX_TEMPLATES, TemplateSet

# Lengths of chains, by row budgets up to that many rows: few rows want the right length, many bear a longer one.
CHAINS = {
    8: (2, 3, 4, 5, 6, 7),
    16: (3, 5, 7, 9, 11, MAX_COPIES),
    MAX_ROWS: (3, 7, 11, MAX_COPIES),
}


def chains_within(num_rows: int) -> list[int]:
    """Lengths of the chains that a row budget has templates for."""
    lengths = next(CHAINS[rows] for rows in CHAINS if num_rows <= rows)
    return [length for length in lengths if length < num_rows] or [1]


def with_copies(
    sets: Iterable[TemplateSet],
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> tuple[TemplateSet, ...]:
    """Each set with templates that copy: chains of several lengths, each beside the best tree for the other rows.

    A set that has such templates stays as it is; a large one gets as many as it has room for.
    """
    sets = tuple(sets)
    lengths = [
        []
        if any(template.num_copies for template in one.templates)
        else chains_within(one.first.num_rows)[: MAX_TEMPLATES - len(one.templates)]
        for one in sets
    ]
    left = {
        one.first.num_rows - length
        for one, own in zip(sets, lengths, strict=True)
        for length in own
    }
    budgets = sorted(rows for rows in left if rows >= MIN_ROWS)
    trees = dict(zip(budgets, best_templates(budgets, acceptance), strict=True)) if budgets else {}
    return tuple(
        TemplateSet(
            one.templates
            + tuple(
                _beside_chain(trees.get(one.first.num_rows - n), one.first.num_rows, n) for n in own
            ),
            one.gain,
        )
        for one, own in zip(sets, lengths, strict=True)
    )


def copies_alone(budgets: Iterable[int]) -> tuple[TemplateSet, ...]:
    """A set of chains for each row budget, of every length, the longest first: blocks without masks."""
    return tuple(
        TemplateSet(
            tuple(Template.build([], {}, n) for n in range(min(rows - 1, MAX_COPIES), 0, -1))
        )
        for rows in budgets
    )


def _beside_chain(tree: Template | None, num_rows: int, copies: int) -> Template:
    """The chain beside a tree; without one, beside what mask rows of the root there is room for."""
    if tree is None:
        masks = num_rows - copies - 1
        return Template.build([], {0: masks} if masks else {}, copies)
    shape = tree.shape
    nodes = list(zip(shape.parent[1:], shape.rank[1:], strict=True))
    return Template.build(nodes, dict(enumerate(shape.group)), copies)

"""Search for the best template: budget kept, model of the process right."""

from itertools import pairwise

import numpy as np
import pytest
from tree_tools import expected_length, long_run_of

from bita_vllm.tree import Template, TemplateError
from bita_vllm.tree.search import (
    acceptance_table,
    best_template,
    best_templates,
    evaluate,
    every_shape,
    grow,
    polish,
)


@pytest.mark.parametrize("num_rows", [3, 4, 7, 16, 24, 33])
def test_best_template_keeps_the_budget_and_beats_a_chain(num_rows):
    template = best_template(num_rows, 3)
    assert 3 <= template.num_rows <= num_rows
    if num_rows >= 16:
        chain = Template.from_widths([1, 1, 1], 3)
        assert expected_length(template) > expected_length(chain)


def test_a_larger_budget_is_never_worse():
    lengths = [expected_length(t) for t in best_templates(range(3, 30), acceptance_table(None, 3))]
    assert all(b >= a - 1e-9 for a, b in pairwise(lengths))


def test_expected_length_equals_a_simulation():
    """Monte Carlo of the process itself: walk, stop, take what candidates the stop offers."""
    template = Template.build([(0, 0), (0, 1), (1, 0), (3, 0)], {0: 3, 1: 1, 2: 2})
    acceptance = np.array([[0.5, 0.2], [0.4, 0.1], [0.3, 0.1]])
    # by age; after a top candidate, after a lower one
    table = np.array([[acceptance * (1 - 0.2 * age), acceptance * 0.6] for age in range(3)])
    generator = np.random.default_rng(0)
    sources: tuple[int, ...] = ()
    emitted, steps = 0, 30_000
    mask_index, rows = template.mask_index, 0
    for _ in range(steps):
        node, depth = 0, 0
        rows += template.restrict(len(sources)).num_rows
        while True:
            children = [r for r in range(1, template.num_nodes) if template.parent[r] == node]
            emitted += 1
            draw, hit = generator.random(), None
            if depth < len(sources):
                for child in children:
                    mask, lower = sources[depth], int(template.rank[node] > 0)
                    draw -= table[mask - depth, lower, mask, template.rank[child]]
                    if draw < 0:
                        hit = child
                        break
            if hit is None:
                break
            node, depth = hit, depth + 1
        masks = template.candidate_rows[node]
        sources = tuple(int(mask_index[r]) for r in masks if r >= 0)
    expected = long_run_of(template, table)
    assert emitted / steps == pytest.approx(expected.accepted_length[0], rel=0.01)
    assert rows / steps == pytest.approx(expected.rows[0], rel=0.01)


def random_acceptance(seed: int) -> np.ndarray:
    """`[3, 2, 3, 4]`, falling with rank, age and mask as measured ones do."""
    generator = np.random.default_rng(seed)
    table = np.sort(generator.random((3, 2, 3, 4)) ** 3, axis=-1)[..., ::-1]
    table = table / table.sum(axis=-1, keepdims=True) * generator.uniform(0.4, 0.9)
    table = np.sort(np.sort(table, axis=0), axis=2)[::-1, :, ::-1]
    return np.ascontiguousarray(table)


@pytest.mark.parametrize("seed", range(6))
def test_up_to_ten_rows_the_best_of_all_templates_is_found(seed):
    """And growing and polishing alone, which larger budgets rest on, comes close."""
    table = acceptance_table(None, 3) if seed == 0 else random_acceptance(seed)
    budgets = range(3, 11)
    grown = grow(max(budgets), table, exact_rows=0)
    best, gap, search_gap = 0.0, [], []
    for budget, template in zip(budgets, best_templates(budgets, table), strict=True):
        drafts = list(every_shape(budget, 3, table.shape[-1]))
        best = max(best, evaluate(drafts, table).accepted_length.max())
        searched = evaluate([polish(grown[budget], budget, table)], table)
        gap.append(1 - long_run_of(template, table).accepted_length[0] / best)
        search_gap.append(1 - searched.accepted_length[0] / best)
    print(
        "rows: gap of the search",
        *(f"{r}: {g:.2%}" for r, g in zip(budgets, search_gap, strict=True)),
    )
    assert max(gap) < 1e-9
    assert max(search_gap) < 0.03


def test_every_template_of_four_rows():
    """A chain with two groups; one or two nodes under a root with the other rows."""
    drafts = {(d.parent, d.group) for d in every_shape(4, 3, 4)}
    assert drafts == {
        ((-1,), (3,)),
        ((-1, 0), (2, 0)),
        ((-1, 0), (1, 1)),
        ((-1, 0, 0), (1, 0, 0)),
        ((-1, 0, 1), (1, 0, 0)),
    }


def test_moving_nodes_about_helps_or_leaves_the_template_alone():
    table = random_acceptance(7)
    for budget in (12, 20, 30):
        grown = grow(budget, table)[budget]
        polished = polish(grown, budget, table)
        lengths = evaluate([grown, polished], table).accepted_length
        assert polished.num_rows <= budget
        assert lengths[1] >= lengths[0]


def test_templates_keep_the_likeliest_path_first():
    for template in best_templates([8, 16, 32], acceptance_table(None, 3)):
        path = [row for row in range(1, template.num_nodes) if template.rank[row] == 0]
        chain, row = [], 0
        while row >= 0:
            chain.append(row)
            row = next((r for r in path if template.parent[r] == row), -1)
        assert chain == list(range(len(chain)))


def test_the_default_statistics_give_the_first_adapters_measured_lengths():
    """Measured on MT-Bench: chain of 3 1.445, 3/2/1 1.686, 5/4/3 1.826."""
    for widths, measured in (((1, 1, 1), 1.445), ((3, 2, 1), 1.686), ((5, 4, 3), 1.826)):
        template = Template.from_widths(widths, 3)
        assert expected_length(template) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    "acceptance", [[[0.5]], [[0.5], [0.2, 0.1], [0.1]], [[0.9, 0.9]] * 3, [[]] * 3]
)
def test_malformed_statistics_are_refused(acceptance):
    with pytest.raises(TemplateError, match="Acceptance statistics"):
        best_template(10, 3, {"rank_probability": acceptance})


def test_a_budget_without_room_for_a_draft_is_refused():
    with pytest.raises(TemplateError, match="row budget of 2"):
        best_template(2, 3)

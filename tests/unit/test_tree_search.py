"""Search for the best template: budget kept, model of the process right."""

from itertools import pairwise

import numpy as np
import pytest

from bita_vllm.tree import Template, TemplateError
from bita_vllm.tree_search import DEFAULT_ACCEPTANCE, best_template, expected_length


@pytest.mark.parametrize("num_rows", [3, 4, 7, 16, 24, 33])
def test_best_template_keeps_the_budget_and_beats_a_chain(num_rows):
    template = best_template(num_rows, 3)
    assert 3 <= template.num_rows <= num_rows
    if num_rows >= 16:
        chain = Template.from_widths([1, 1, 1], 3)
        assert expected_length(template, DEFAULT_ACCEPTANCE) > expected_length(
            chain, DEFAULT_ACCEPTANCE
        )


def test_a_larger_budget_is_never_worse():
    lengths = [expected_length(best_template(r, 3), DEFAULT_ACCEPTANCE) for r in range(3, 30)]
    assert all(b >= a - 1e-9 for a, b in pairwise(lengths))


def test_expected_length_equals_a_simulation():
    """Monte Carlo of the process itself: walk, stop, take what candidates the stop offers."""
    template = Template.build([(0, 0), (0, 1), (1, 0), (3, 0)], {0: 3, 1: 1, 2: 2})
    acceptance = [[0.5, 0.2], [0.4, 0.1], [0.3, 0.1]]
    generator = np.random.default_rng(0)
    sources: tuple[int, ...] = ()
    emitted, steps = 0, 60_000
    mask_index = template.mask_index
    for _ in range(steps):
        node, depth = 0, 0
        while True:
            children = [r for r in range(1, template.num_nodes) if template.parent[r] == node]
            emitted += 1
            draw, hit = generator.random(), None
            if depth < len(sources):
                for child in children:
                    draw -= acceptance[sources[depth]][template.rank[child]]
                    if draw < 0:
                        hit = child
                        break
            if hit is None:
                break
            node, depth = hit, depth + 1
        rows = template.candidate_rows[node]
        sources = tuple(int(mask_index[r]) for r in rows if r >= 0)
    assert emitted / steps == pytest.approx(expected_length(template, acceptance), rel=0.01)


def test_the_default_statistics_give_the_first_adapters_measured_lengths():
    """Measured on MT-Bench: chain of 3 1.445, 3/2/1 1.686, 5/4/3 1.826."""
    for widths, measured in (((1, 1, 1), 1.445), ((3, 2, 1), 1.686), ((5, 4, 3), 1.826)):
        assert expected_length(
            Template.from_widths(widths, 3), DEFAULT_ACCEPTANCE
        ) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    "acceptance", [[[0.5]], [[0.5], [0.2, 0.1], [0.1]], [[0.9, 0.9]] * 3, [[]] * 3]
)
def test_malformed_statistics_are_refused(acceptance):
    with pytest.raises(TemplateError, match="Acceptance statistics"):
        best_template(10, 3, acceptance)


def test_a_budget_without_room_for_a_draft_is_refused():
    with pytest.raises(TemplateError, match="row budget of 2"):
        best_template(2, 3)

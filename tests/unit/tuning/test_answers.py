"""What whole answers say of the adapter's statistics."""

import numpy as np
import pytest

from bita_vllm.tree import Template
from bita_vllm.tree.search import acceptance_table, evaluate, scaled
from bita_vllm.tree.template_set import TemplateSet
from bita_vllm.tuning.answers import Answers, acceptance_reached

ACCEPTANCE = acceptance_table(None, 3)  # [1, 2, 3, ranks]
TEMPLATE = Template.from_widths([2, 1], 3)
TEMPLATES = TemplateSet((TEMPLATE,), 1.1)


def expected_length(acceptance):
    return float(evaluate([TEMPLATE.shape], acceptance).accepted_length[0]) * TEMPLATES.gain


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0, 1.1])
def test_the_factor_gives_the_length_that_was_seen(share):
    seen = 1 + (expected_length(ACCEPTANCE) - 1) * share
    reached = acceptance_reached(ACCEPTANCE, TEMPLATES, seen)
    assert (reached < 1) == (share < 1) or share == 1.0
    assert expected_length(scaled(ACCEPTANCE, reached)) == pytest.approx(seen, abs=2e-3)


def test_no_length_asks_for_more_than_certain_drafts():
    most = acceptance_reached(ACCEPTANCE, TEMPLATES, 1e9)
    table = scaled(ACCEPTANCE, most)
    assert table.sum(axis=-1).max() == pytest.approx(1.0, abs=1e-3)
    assert scaled(ACCEPTANCE, 1e3).sum(axis=-1).max() <= 1 + 1e-12
    assert acceptance_reached(ACCEPTANCE, TEMPLATES, TEMPLATES.gain) == pytest.approx(0.0, abs=1e-3)


def test_answers_know_how_sure_they_are():
    few, many = Answers(8, 190, 100), Answers(8, 19_000, 10_000)
    assert few.accepted_length == many.accepted_length == 1.9
    assert few.spread == pytest.approx(0.1)
    assert many.spread == pytest.approx(0.01)
    rng = np.random.default_rng(0)
    means = rng.choice([1.0, 2.0, 3.0], p=[0.4, 0.3, 0.3], size=(2000, 100)).mean(axis=1)
    assert (abs(means / 1.9 - 1) <= few.spread).mean() > 0.95

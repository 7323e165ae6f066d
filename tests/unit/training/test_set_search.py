"""Sets are found on answers that are sure in places and unsure in others, and measured as the engine decodes."""

import numpy as np
import pytest
from two_kinds import K, predictions

from bita_vllm.training.evaluate import (
    Predictions,
    acceptance_statistics,
    accepted_lengths,
    chosen_lengths,
)
from bita_vllm.training.set_search import find_set, find_sets
from bita_vllm.tree import Template, TemplateError
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table, best_template
from bita_vllm.tree.template_set import TemplateSet, saved_sets, set_within


def mean(lengths):
    return np.concatenate(lengths).mean()


@pytest.fixture(scope="module")
def recorded():
    return predictions()


@pytest.fixture(scope="module")
def statistics(recorded):
    return acceptance_statistics(recorded.ranks)


def test_a_set_gains_where_confidence_varies(recorded, statistics):
    table = acceptance_table(statistics, K)
    found = find_set(best_template(12, K, statistics), table, recorded)
    other = predictions(seed=1)
    alone, together = (
        mean(accepted_lengths(found.first, other.ranks)),
        mean(chosen_lengths(found, table, other)),
    )
    print(f"12 rows, other answers: {alone:.3f} alone, {together:.3f} with {len(found.templates)}")
    assert found.has_choice
    assert all(template.num_rows <= 12 for template in found.templates)
    assert together > 1.05 * alone
    assert together / alone == pytest.approx(found.gain, abs=0.03)


def test_a_set_is_one_tree_where_all_places_are_alike():
    alike = predictions(two_kinds=False)
    statistics = acceptance_statistics(alike.ranks)
    found = find_set(best_template(12, K, statistics), acceptance_table(statistics, K), alike)
    assert not found.has_choice


def test_one_template_alone_is_replayed_as_before(recorded, statistics):
    only = TemplateSet((best_template(16, K, statistics),))
    lengths = chosen_lengths(only, acceptance_table(statistics, K), recorded)
    assert lengths == accepted_lengths(only.first, recorded.ranks)


def test_sets_are_saved_with_the_statistics_and_used_by_budget(recorded, statistics):
    sets = find_sets(
        [6, 12], {**statistics}, Predictions(recorded.ranks * 2, recorded.probabilities * 2)
    )
    acceptance = {**statistics, "template_sets": sets}
    assert saved_sets(acceptance)[12].to_dict() == sets["12"]
    assert set_within(12, K, acceptance).to_dict() == sets["12"]
    other = set_within(13, K, acceptance)
    assert not other.has_choice
    assert other.first.to_dict() == best_template(13, K, statistics).to_dict()


def test_few_answers_give_no_sets(statistics):
    assert find_sets([12], statistics, predictions(num_answers=1)) == {}


def test_a_ladder_keeps_its_sets(tmp_path, recorded, statistics):
    found = find_set(best_template(12, K, statistics), acceptance_table(statistics, K), recorded)
    ladder = Ladder.fixed(found)
    ladder.save(tmp_path / "ladder.json")
    (again,) = Ladder.load(tmp_path / "ladder.json").template_sets
    assert again.to_dict() == found.to_dict()
    assert f"one of {len(found.templates) - 1} other trees" in ladder.describe()


def test_what_cannot_be_a_set():
    small, large = Template.from_widths([1], 3), Template.from_widths([2, 1], 3)
    with pytest.raises(TemplateError, match="first template has 8 rows and another one 16"):
        TemplateSet((small, large))
    with pytest.raises(TemplateError, match="gain is 3"):
        TemplateSet((large, small), 3.0)
    with pytest.raises(TemplateError, match=r"cannot be read .* run 'bita eval'"):
        saved_sets({"template_sets": {"8": {"gain": 1.1}}})

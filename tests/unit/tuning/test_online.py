"""Rows by load while serving: the table follows what is seen."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bita_vllm.ladder import Ladder
from bita_vllm.training.evaluate import acceptance_statistics, accepted_lengths
from bita_vllm.training.walk import TreeWalker
from bita_vllm.tree import Template
from bita_vllm.tree_search import acceptance_table, best_templates, long_run_of
from bita_vllm.tuning.choose import choose_ladder
from bita_vllm.tuning.cost import H100_8B, MeasuredCost
from bita_vllm.tuning.online import REVIEW_SECONDS, Acceptance, WidthPolicy, policy_of
from bita_vllm.tuning.simulator import simulate, synthetic_traces

GOOD, POOR = (0.6, 0.4, 0.28), (0.15, 0.08, 0.05)
ROWS_COST = MeasuredCost([(1, 1, 0.05), (1, 2, 0.054)])  # each row of a request an eighth
ROWS_COST_MORE = MeasuredCost([(1, 1, 0.05), (1, 2, 0.1)])
BUDGETS = (3, 4, 6, 8, 12)


@cache
def statistics(masks):
    traces = synthetic_traces(masks, 80, 256, seed=0)
    return acceptance_table(acceptance_statistics(traces), 3)


def served(masks):
    return synthetic_traces(masks, 80, 256, seed=1)


def replay_into(tracker, template, traces):
    walker = TreeWalker(template)
    for answer in (trace.tolist() for trace in traces):
        root, sources = 0, []
        while root < len(answer) - 1:
            step = walker.step(answer, root, sources)
            tracker.add([step.line], [step.last_node])
            root, sources = root + step.emitted, step.sources


@pytest.mark.parametrize("masks", [GOOD, POOR, (0.6, 0.1, 0.05), (0.3, 0.3, 0.3)])
@pytest.mark.parametrize("rows", [4, 24])
def test_estimate_predicts_the_load_that_was_seen(masks, rows):
    """Expected GOOD, served something else: lengths of that template as they were replayed."""
    expected = statistics(GOOD)
    (template,) = best_templates([rows], expected)
    tracker = Acceptance([template], expected)
    traces = served(masks)
    replay_into(tracker, template, traces)
    length = long_run_of(template, tracker.estimate()).accepted_length[0]
    replayed = np.concatenate(accepted_lengths(template, traces)).mean()
    assert length == pytest.approx(replayed, rel=0.03)


def test_evidence_of_one_template_speaks_for_the_others():
    expected = statistics(GOOD)
    small, large = best_templates([8, 32], expected)
    tracker = Acceptance([small, large], expected)
    traces = served(POOR)
    replay_into(tracker, small, traces)  # lines of the first template
    length = long_run_of(large, tracker.estimate()).accepted_length[0]
    replayed = np.concatenate(accepted_lengths(large, traces)).mean()
    # Ranks that the small tree has not are taken to have fallen alike: they have not quite.
    before = long_run_of(large, expected).accepted_length[0]
    assert before > 1.3 * replayed
    assert abs(length - replayed) < 0.5 * abs(before - replayed)


def test_nothing_seen_is_what_was_expected():
    expected = statistics(GOOD)
    tracker = Acceptance([Template.from_widths([5, 4, 3], 3)], expected)
    assert tracker.estimate() == pytest.approx(expected)


def test_evidence_fades():
    expected = statistics(GOOD)
    template = Template.from_widths([3, 2, 1], 3)
    tracker = Acceptance([template], expected)
    replay_into(tracker, template, served(POOR))
    seen = long_run_of(template, tracker.estimate()).accepted_length[0]
    for _ in range(100):
        tracker.fade()
    faded = long_run_of(template, tracker.estimate()).accepted_length[0]
    assert faded == pytest.approx(long_run_of(template, expected).accepted_length[0], rel=0.02)
    assert faded > 1.2 * seen


@cache
def chosen():
    return choose_ladder(statistics(GOOD), ROWS_COST, 8, budgets=BUDGETS)[0]


def under_load(masks, cost, n=4):
    """Ratio to plain decoding with the ladder's own table, and with a policy that follows the load."""
    ladder = chosen()
    policy = WidthPolicy(ladder, statistics(GOOD), ROWS_COST, 8, now=0.0)
    still = simulate(ladder, served(masks), cost, n, num_walks=8000)
    return still, simulate(ladder, served(masks), cost, n, num_walks=8000, policy=policy)


def test_a_load_as_expected_keeps_its_table():
    still, online = under_load(GOOD, ROWS_COST)
    assert still.ratio > 1.25
    assert online.width == still.width
    assert online.ratio == pytest.approx(still.ratio, rel=0.03)


def test_poor_acceptance_leads_to_plain_decoding():
    still, online = under_load(POOR, ROWS_COST)
    assert still.ratio < 0.94
    assert online.ratio > 0.97


def test_rows_that_cost_more_than_measured_lead_to_fewer():
    still, online = under_load(GOOD, ROWS_COST_MORE)
    assert still.ratio < 0.5
    assert online.width == 0
    # Of 106 seconds the ten before the first review went at the old width.
    assert online.ratio > 0.87


def test_a_machine_slower_at_everything_keeps_its_table():
    slower = MeasuredCost([(1, 1, 0.1), (1, 2, 0.108)])
    still, online = under_load(GOOD, slower)
    assert online.width == still.width
    assert online.ratio == pytest.approx(still.ratio, rel=0.03)


def test_what_lost_is_tried_again_when_the_load_has_changed():
    ladder = chosen()
    policy = WidthPolicy(ladder, statistics(GOOD), ROWS_COST, 8, now=0.0)
    before = list(policy.lookup)
    simulate(ladder, served(POOR), ROWS_COST, 4, policy=policy, num_walks=4000)
    assert policy.lookup[4] == 0
    now = 1000.0  # later than any step of the simulation
    for _ in range(60):
        now += REVIEW_SECONDS
        policy.review(now)
    assert policy.lookup == before


def test_policy_uses_no_width_that_the_ladder_does_not_name():
    """Not even plain decoding: on a GPU graphs are captured for these only."""
    templates = {t.num_rows - 1: t for t in best_templates([4, 8, 24], statistics(GOOD))}
    ladder = Ladder(templates, [(1, 4, 23), (5, 8, 7)], {"step_seconds": []})
    policy = WidthPolicy(ladder, statistics(GOOD), H100_8B, 8, padded=True, now=0.0)
    lines = [3] * 8
    for _ in range(200):
        policy.saw_step(lines, [0] * 8, 8, 1.0)  # nothing accepted, and steps take for ever
    policy.review(REVIEW_SECONDS)
    assert set(policy.lookup[1:]) <= {23, 7}


def test_ladders_without_measured_cost_stay_as_they_are():
    template = Template.from_widths([2, 1], 3)
    points = {"step_seconds": [[1, 1, 1.0], [1, 4, 1.1]]}
    adapter = str(Path(__file__).parents[3] / "adapters" / "smollm2-135m-instruct")
    assert policy_of(Ladder.fixed(template), adapter, 8, padded=False) is None
    width = template.num_rows - 1
    ranges = [(1, 2, width), (3, 8, 0)]
    assert policy_of(Ladder({width: template}, ranges), adapter, 8, False) is None
    assert policy_of(Ladder({width: template}, ranges, points), adapter, 8, False)

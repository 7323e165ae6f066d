"""Cost models, and the ladder that they lead to."""

import numpy as np
import pytest
from tree_tools import long_run_of

from bita_vllm.tree.ladder_search import choose_ladder
from bita_vllm.tree.search import acceptance_table, best_templates
from bita_vllm.tree.step_cost import H100_8B, CostError, MeasuredCost, Roofline

ACCEPTANCE = acceptance_table(None, 3)
BUDGETS = (3, 4, 6, 8, 12, 16)
# (requests, rows a request, seconds)
POINTS = [
    (1, 1, 0.05),
    (1, 4, 0.08),
    (1, 8, 0.12),
    (4, 1, 0.08),
    (4, 4, 0.17),
    (8, 1, 0.12),
    (8, 4, 0.30),
]


def test_measured_cost_is_linear_between_its_points_and_beyond():
    cost = MeasuredCost(POINTS)
    for requests, rows, seconds in POINTS:
        assert cost.seconds(requests, requests * rows) == pytest.approx(seconds)
    assert cost.seconds(1, 6) == pytest.approx(0.10)
    assert cost.seconds(1, 10) == pytest.approx(0.14)
    assert cost.seconds(6, 6) == pytest.approx(0.10)
    assert cost.seconds(16, 16) == pytest.approx(0.20)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(1, 1, 0.1)], "at 1 requests was measured for"),
        ([(1, 2, 0.1), (1, 4, 0.1)], "expected 1 and at least one larger"),
        ([(1, 1, 0.1), (1, 4, float("nan"))], "expected positive numbers"),
    ],
)
def test_measurements_that_say_nothing_are_refused(points, message):
    with pytest.raises(CostError, match=message):
        MeasuredCost(points)


def test_roofline_by_hand():
    """1 TB of weights at 1 TB/s; 1e12 flops a row at 10 TFLOP/s: products take over at 10 rows."""
    cost = Roofline(1e12, 1e12, 1e9, 1e12, 1e13, overhead=0.25, block_overhead=0.5)
    assert cost.seconds(1, 1, 0) == pytest.approx(1.25)
    assert cost.seconds(1, 8, 0) == pytest.approx(1.75)
    assert cost.seconds(4, 20, 100) == pytest.approx(2.0 + 0.4 + 0.75)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cost", [MeasuredCost(POINTS), H100_8B], ids=["measured", "H100"])
def test_each_batch_size_gets_the_fastest_width(cost, padded):
    ladder, choices = choose_ladder(
        ACCEPTANCE, cost, 100, budgets=BUDGETS, padded=padded, min_gain=0.0
    )
    assert [choice.batch_size for choice in choices] == list(range(1, 101))
    table = ladder.lookup(300)
    runs = [(t, long_run_of(t, ACCEPTANCE)) for t in best_templates(BUDGETS, ACCEPTANCE)]
    for choice in choices:
        n = choice.batch_size
        speeds = {0: n / cost.seconds(n, n, 512)}
        for template, run in runs:
            rows = template.num_rows if padded else run.rows[0]
            speed = n * run.accepted_length[0] / cost.seconds(n, n * rows, 512)
            speeds[template.width] = float(speed)
        assert speeds[choice.width] == pytest.approx(max(speeds.values()))
        assert choice.gain == pytest.approx(speeds[choice.width] / speeds[0])
        assert table[n] == choice.width
    assert table[300] == choices[-1].width


def test_plain_decoding_where_rows_cost_too_much():
    """A row costs as much as a step: no draft can pay."""
    cost = MeasuredCost([(1, 1, 1.0), (1, 2, 2.0), (8, 1, 8.0), (8, 2, 16.0)])
    ladder, choices = choose_ladder(ACCEPTANCE, cost, 8, budgets=BUDGETS)
    assert not ladder.lookup(8).any()
    assert {choice.gain for choice in choices} == {1.0}


def test_what_might_be_no_gain_is_left_alone():
    cost = MeasuredCost([(1, 1, 1.0), (1, 2, 1.0), (1, 16, 1.0)])
    length = long_run_of(best_templates([4], ACCEPTANCE)[0], ACCEPTANCE).accepted_length[0]
    for min_gain, width in ((length - 1.01, 3), (length - 0.99, 0)):
        ladder, _ = choose_ladder(ACCEPTANCE, cost, 1, budgets=(4,), min_gain=float(min_gain))
        assert ladder.lookup(1).tolist() == [0, width]


def test_better_acceptance_never_chooses_a_slower_ladder():
    gains = []
    for scale in np.linspace(0.2, 1.2, 6):
        _, choices = choose_ladder(ACCEPTANCE * scale, H100_8B, 64, budgets=BUDGETS, padded=True)
        gains.append([choice.gain for choice in choices])
    assert (np.diff(gains, axis=0) >= -1e-9).all()


def test_drafts_only_where_they_beat_plain_decoding_beyond_what_the_times_may_be_off():
    """Two requests were timed among neighbours: the same gain is not sure there."""
    points = [(n, rows, 0.05 + 0.005 * (rows - 1)) for n in (1, 2) for rows in (1, 3, 6)]
    _, choices = choose_ladder(ACCEPTANCE, MeasuredCost(points), 2, budgets=BUDGETS)
    gain = choices[0].gain
    assert choices[0].width == choices[1].width > 0
    for spread, drafts in ((0.9 * (gain - 1), True), (1.1 * (gain - 1), False)):
        timed = [(*point, spread * (point[0] == 2) * (point[1] > 1)) for point in points]
        _, choices = choose_ladder(ACCEPTANCE, MeasuredCost(timed), 2, budgets=BUDGETS)
        assert choices[0].width > 0 and choices[0].spread == 0
        assert (choices[1].width > 0) == drafts
        assert choices[1].spread == (pytest.approx(spread) if drafts else 0)

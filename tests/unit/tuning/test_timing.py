"""How sure a ratio of step times is, and that a neighbour's bursts do not move it."""

import numpy as np
import pytest

from bita_vllm.scheduling.timing import (
    CONFIDENCE,
    StepTime,
    compare_with_plain,
    median_interval,
    min_rounds,
)
from bita_vllm.tuning.profile import MOST_ROUNDS, PRECISION, is_precise

SECONDS = {0: 0.020, 3: 0.021, 7: 0.024}
CORES = 2


def round_of(rng, noise, burst=0.0):
    """Four steps of each width; in a burst a neighbour takes one of the cores for half of them."""
    found = {}
    for width, seconds in SECONDS.items():
        times = []
        for _ in range(4):
            wall = seconds * np.exp(noise * rng.standard_normal())
            cpu = CORES * wall * 0.9
            if rng.random() < burst:
                wall *= rng.uniform(1.2, 2.0)  # the same work, waiting for a core in between
            times.append(StepTime(width + 1.0, wall, cpu))
        found[width] = times
    return found


@pytest.mark.parametrize("num_values", [6, 9, 24, 100])
def test_interval_holds_the_median_as_often_as_it_says(num_values):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval(rng.exponential(size=num_values))
        held += low <= np.log(2) <= high
    assert held / 2000 >= CONFIDENCE - 0.01


def test_fewest_rounds_are_those_whose_range_is_an_interval():
    assert 2 * 0.5 ** min_rounds() <= 1 - CONFIDENCE < 2 * 0.5 ** (min_rounds() - 1)


@pytest.mark.parametrize("burst", [0.0, 0.3, 0.6])
def test_ratios_are_those_of_a_quiet_machine(burst):
    """Also where the neighbour had a core in more than half of the steps."""
    rng = np.random.default_rng(1)
    rounds = [round_of(rng, 0.01, burst) for _ in range(MOST_ROUNDS)]
    plain, found = compare_with_plain(rounds)
    assert plain == pytest.approx(SECONDS[0], rel=0.02)
    assert list(found) == [3, 7]
    for width, comparison in found.items():
        expected = SECONDS[width] / SECONDS[0]
        assert comparison.ratio == pytest.approx(expected, rel=0.02)
        assert comparison.low <= comparison.ratio <= comparison.high
        assert comparison.low * 0.99 <= expected <= comparison.high * 1.01
        assert comparison.rows == width + 1


def test_a_neighbour_who_never_rests_leaves_all_steps_and_a_wide_interval():
    rng = np.random.default_rng(2)
    quiet = [round_of(rng, 0.01) for _ in range(8)]
    busy = [round_of(rng, 0.01, burst=0.97) for _ in range(8)]
    _, of_quiet = compare_with_plain(quiet)
    _, of_busy = compare_with_plain(busy)
    assert of_busy[7].spread > 3 * of_quiet[7].spread


def test_rounds_are_enough_when_every_interval_is_narrow():
    rng = np.random.default_rng(3)
    for noise, precise in ((0.001, True), (0.3, False)):
        rounds = [round_of(rng, noise) for _ in range(min_rounds())]
        assert is_precise(rounds) == precise
        spread = max(c.spread for c in compare_with_plain(rounds)[1].values())
        assert (spread <= PRECISION) == precise

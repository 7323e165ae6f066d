"""What steps are taken to cost, by what was seen of which width and batch size."""

import numpy as np
import pytest

from bita_vllm.scheduling.seen_cost import FEW_STEPS, SeenCost
from bita_vllm.tree.ladder_search import PLAIN

SMALL, LARGE = 0, 1
# [T+1, N] two templates and plain decoding, 1 to 8 requests
EXPECTED = np.array([[0.06], [0.09], [0.05]]) * (1 + 0.1 * np.arange(8))


def cost_of(*loads, steps=300):
    """Loads: (template, requests, factor on what is expected)."""
    cost = SeenCost(EXPECTED)
    for template, n, factor in loads:
        for _ in range(steps):
            cost.add(template, n, factor * EXPECTED[template, n - 1])
    return cost


def factors(cost):
    """[T+1, N] of the expected seconds."""
    return cost.seconds() / EXPECTED


def beside_plain(cost):
    """[T, N] seconds of blocks over plain decoding's, of what was expected of that."""
    found = factors(cost)
    return found[:PLAIN] / found[PLAIN]


def test_nothing_seen_is_what_was_expected():
    assert factors(SeenCost(EXPECTED)) == pytest.approx(np.ones((3, 8)))


def test_what_was_seen_is_found_again_where_it_was_seen():
    cost = cost_of((SMALL, 1, 0.8), (PLAIN, 1, 1.1), (SMALL, 4, 1.6), (PLAIN, 4, 0.9))
    found = factors(cost)
    assert found[SMALL, [0, 3]] == pytest.approx([0.8, 1.6], rel=0.03)
    assert found[PLAIN, [0, 3]] == pytest.approx([1.1, 0.9], rel=0.03)


def test_a_batch_size_speaks_for_its_octave():
    cost = cost_of((LARGE, 5, 1.5), (PLAIN, 7, 1.2))
    assert factors(cost)[:, 3:7] == pytest.approx(factors(cost)[:, [4] * 4])
    assert factors(cost)[LARGE, 3] == pytest.approx(1.5, rel=0.03)


def test_blocks_cheap_at_one_batch_size_are_not_taken_for_cheap_at_others():
    cost = cost_of((SMALL, 1, 0.7), (PLAIN, 1, 1.0))
    assert beside_plain(cost)[SMALL, 1:] == pytest.approx(np.ones(7), rel=0.01)
    assert beside_plain(cost)[LARGE] == pytest.approx(np.ones(8), rel=0.01)


def test_blocks_dear_at_one_batch_size_are_taken_for_dear_at_all_and_in_all_widths():
    cost = cost_of((SMALL, 1, 2.0), (PLAIN, 1, 1.0))
    assert beside_plain(cost) == pytest.approx(np.full((2, 8), 2.0), rel=0.05)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_a_machine_slower_or_faster_at_a_batch_size_says_nothing_of_blocks(factor):
    cost = cost_of((PLAIN, 2, factor), (PLAIN, 8, 1.0), (SMALL, 1, 1.0), (PLAIN, 1, 1.0))
    assert beside_plain(cost)[:, 1] == pytest.approx(np.ones(2), rel=0.03)


def test_steps_of_blocks_and_single_rows_tell_what_blocks_cost():
    """Blocks take 1.5 times what is expected, plain steps 1.2 times; half of the requests have one."""
    cost = SeenCost(EXPECTED)
    blocks, plain = EXPECTED[SMALL, 3], EXPECTED[PLAIN, 3]
    for _ in range(3):  # the plain part is told from what was found before
        for _ in range(200):
            cost.add(SMALL, 4, 0.5 * 1.5 * blocks + 0.5 * 1.2 * plain, share=0.5)
            cost.add(PLAIN, 4, 1.2 * plain)
        found = factors(cost)
        cost.fade(0.05)
    assert found[[SMALL, PLAIN], 3] == pytest.approx([1.5, 1.2], rel=0.03)


def test_a_step_much_longer_than_its_like_does_not_count():
    cost = cost_of((SMALL, 2, 1.0), (PLAIN, 2, 1.0))
    before = cost.seconds()
    cost.add(SMALL, 3, 10 * EXPECTED[SMALL, 2])
    assert cost.seconds() == pytest.approx(before)


def test_evidence_fades():
    cost = cost_of((SMALL, 2, 2.0), (PLAIN, 2, 1.0))
    cost.fade(1e-5)
    assert factors(cost) == pytest.approx(np.ones((3, 8)), rel=0.02)


@pytest.mark.parametrize(
    ("loads", "needed"),
    [
        ([], False),
        ([(SMALL, 4, 1.0)], False),
        ([(SMALL, 4, 1.5)], True),
        ([(SMALL, 4, 0.7)], True),
        ([(SMALL, 4, 1.5), (PLAIN, 4, 1.0)], False),  # it was the rows
        ([(SMALL, 4, 1.5), (PLAIN, 4, 1.5)], False),  # it was the machine
        ([(SMALL, 4, 1.5), (PLAIN, 1, 1.0)], True),
        ([(SMALL, 4, 1.5), (PLAIN, 1, 1.5)], False),  # slower everywhere
        ([(SMALL, 1, 1.5)], False),  # not what the load is now
    ],
)
def test_plain_steps_are_asked_for_where_they_tell_rows_from_the_machine(loads, needed):
    cost = cost_of(*loads)
    cost.seconds()
    assert cost.needs_plain_steps(4) is needed


def test_few_steps_ask_for_nothing():
    cost = cost_of((SMALL, 4, 1.5), steps=FEW_STEPS - 1)
    cost.seconds()
    assert not cost.needs_plain_steps(4)

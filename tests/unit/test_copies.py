"""The copy source of the CPU runner: slots, and how likely copies are."""

import numpy as np
import pytest
import torch
from bita_kernels.copy_rules import MAX_COPIES

from bita_vllm.step.copies import CopyIndex
from bita_vllm.step.copy_chance import CopyChance

pytestmark = pytest.mark.usefixtures("two_threads")
TEXT = [1, 2, 3, 4, 5, 1, 2, 3]


def step(index, **texts):
    """{request: (copies, chances)}"""
    rows = torch.full((4, 64), -7, dtype=torch.int32)
    for row, text in zip(rows, texts.values(), strict=False):
        row[: len(text)] = torch.tensor(text)
    sizes = np.array([len(text) for text in texts.values()])
    copies, chances = index(list(texts), rows, sizes)
    return {name: (copies[i].tolist(), chances[i].tolist()) for i, name in enumerate(texts)}


def test_a_copy_is_as_likely_as_its_match_is_long():
    found = step(CopyIndex(4, 64), a=TEXT, b=[1, 2, 3])
    copies, chances = found["a"]
    assert copies[:4] == [4, 5, 1, 2]
    assert chances == pytest.approx([m / (m + 2) for m in range(3, 3 + MAX_COPIES)])
    assert found["b"] == ([0] * MAX_COPIES, [0.0] * MAX_COPIES)


def test_an_index_stays_with_its_request_in_any_row_and_after_steps_without_it():
    index = CopyIndex(4, 64)
    alone = step(CopyIndex(4, 64), a=[*TEXT, 4])["a"][0]
    step(index, a=TEXT, b=[7, 8, 7, 8])
    step(index, b=[7, 8, 7, 8, 7])
    found = step(index, c=[9, 9, 9], b=[7, 8, 7, 8, 7, 8], a=[*TEXT, 4])
    assert found["a"][0] == alone
    assert found["a"][1][0] > 4 / 6, "its copy was taken"
    assert found["b"][0][:3] == [7, 8, 7]


def test_more_requests_than_slots_take_those_of_requests_outside_the_step():
    index = CopyIndex(2, 64)
    for round_ in range(3):
        for a, b in (("a", "b"), ("c", "a"), ("b", "c")):
            texts = {a: [*TEXT, *[4, 5][:round_]], b: [6, 5, 6, 5]}
            found, fresh = step(index, **texts), step(CopyIndex(2, 64), **texts)
            assert {name: found[name][0] for name in texts} == {
                name: fresh[name][0] for name in texts
            }


def after(outcomes, length=4):
    """The first chance of a slot whose copies had these outcomes."""
    chance, slot = CopyChance(3), np.array([1])
    for outcome in outcomes:
        chance(slot, np.array([length]))
        chance.count(slot, np.array([outcome]))
    assert (
        chance(np.array([0, 2]), np.array([4, 4])) == CopyChance(1)(np.array([0]), np.array([4]))
    ).all()
    return chance(slot, np.array([length]))[0, 0]


def test_a_request_whose_copies_are_wrong_loses_them_and_one_whose_copies_are_right_trusts_them():
    unknown = after([])
    assert unknown == pytest.approx(4 / 6)
    assert after([(0, 1)] * 3) < unknown < after([(2, 0)] * 3)
    assert after([(0, 1)] * 60) < 0.15
    assert after([(3, 0)] * 60) > 0.9
    # right two times of three, as expected of four agreeing tokens
    assert after([(1, 0), (1, 0), (0, 1)] * 30) == pytest.approx(unknown, abs=0.03)
    assert after([(0, 0)] * 9) == unknown


def test_another_request_in_a_slot_starts_without_evidence():
    chance, slot = CopyChance(1), np.array([0])
    chance(slot, np.array([4]))
    chance.count(slot, np.array([[0, 1]]))
    chance.forget(slot)
    assert chance(slot, np.array([4]))[0, 0] == pytest.approx(4 / 6)

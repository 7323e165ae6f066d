"""Copies on the device against the naive twin, and against the source of the CPU runner."""

import numpy as np
import pytest
import torch
from bita_kernels import find_copies as module
from bita_kernels.copy_rules import MAX_COPIES
from bita_kernels.find_copies import CopyState, find_copies
from bita_kernels.find_copies_naive import find_copies_naive
from hypothesis import given, settings
from hypothesis import strategies as st

from bita_vllm.step.copies import CopyIndex

CPU, SLOTS, POISON = torch.device("cpu"), 5, -7


class Source:
    """A function with its state; outputs, what lies between them and what lies behind a text are poison."""

    def __init__(self, function, max_len=90):
        self.function, self.max_len = function, max_len
        self.state = CopyState.empty(SLOTS, max_len, CPU)
        self.state.keys.fill_(POISON)

    def __call__(self, texts, slots):
        """(copies, chances)"""
        token_ids = torch.full((SLOTS, self.max_len + 3), POISON, dtype=torch.int32)
        num_tokens = torch.full((SLOTS,), self.max_len, dtype=torch.int32)
        for text, slot in zip(texts, slots, strict=True):
            token_ids[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
            num_tokens[slot] = len(text)
        # As one rank of candidates, of one depth more.
        tokens = torch.full((len(texts), MAX_COPIES + 1, 3), POISON)
        chance = torch.full(tokens.shape, float("nan"))
        copies, chances = (each[:, :MAX_COPIES, 1] for each in (tokens, chance))
        rows = token_ids[:, : self.max_len]
        self.function(rows, num_tokens, torch.tensor(slots), self.state, copies, chances)
        between = torch.ones_like(tokens, dtype=torch.bool)
        between[:, :MAX_COPIES, 1] = False
        assert (tokens[between] == POISON).all() and chance[between].isnan().all()
        return copies, chances


TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=90), min_size=1, max_size=4)


@given(TEXTS, st.lists(st.integers(0, 90), max_size=3), st.randoms())
@settings(max_examples=40, deadline=None)
def test_kernel_and_twin_agree_step_by_step(texts, cuts, random):
    with pytest.MonkeyPatch.context() as patch:
        # Several blocks to a split, several splits to a text.
        patch.setattr(module, "BLOCK", 16)
        patch.setattr(module, "MAX_SPLITS", 4)
        kernel, twin = Source(find_copies), Source(find_copies_naive)
        slots = random.sample(range(SLOTS), len(texts))
        for cut in [*sorted(cuts), 90]:
            order = random.sample(range(len(texts)), len(texts))
            step = [texts[i][:cut] for i in order], [slots[i] for i in order]
            (copies, chances), (twin_copies, twin_chances) = kernel(*step), twin(*step)
            assert torch.equal(copies, twin_copies)
            torch.testing.assert_close(chances, twin_chances, rtol=1e-5, atol=1e-6)
            assert torch.equal(kernel.state.last, twin.state.last)


def test_both_runners_have_the_same_copies_and_chances():
    text = np.random.default_rng(1).integers(0, 5, 88).tolist()
    text[40:60] = text[10:30]
    source, index = Source(find_copies), CopyIndex(1, 90)
    for size in range(1, len(text) + 1, 3):
        copies, chances = source([text[:size]], [2])
        rows = torch.full((1, 90), POISON, dtype=torch.int32)
        rows[0, :size] = torch.tensor(text[:size])
        own_copies, own_chances = index(["a"], rows, np.array([size]))
        assert copies.tolist() == own_copies.tolist()
        np.testing.assert_allclose(chances, own_chances, rtol=1e-5)


def test_another_text_in_a_slot_starts_without_evidence():
    for function in (find_copies, find_copies_naive):
        source = Source(function)
        for size in (5, 6, 7):
            source([[1, 2, 9, 1, 2, 3, 3][:size]], [0])
        _, chances = source([[4, 5, 6, 4, 5, 6, 4, 5]], [0])
        assert chances[0, 0] == pytest.approx(5 / 7), function.__name__
        assert (source.state.evidence[0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": torch.zeros(SLOTS)}, "num_tokens has dtype torch.float32"),
        ({"copies": torch.zeros(2, 9, dtype=torch.int64)}, r"copies has shape \[2, 9\]"),
        ({"copies": torch.zeros(2, 15, 2).long()[..., 0]}, "expected those of copies"),
        ({"slots": torch.arange(6)}, "slots has 6 requests, but there are 5 slots"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_launch(change, message):
    num_requests = len(change.get("slots", [0, 1]))
    arguments = {
        "token_ids": torch.zeros(SLOTS, 90, dtype=torch.int32),
        "num_tokens": torch.zeros(SLOTS, dtype=torch.int32),
        "slots": torch.arange(2),
        "state": CopyState.empty(SLOTS, 90, CPU),
        "copies": torch.full((num_requests, MAX_COPIES), POISON),
        "chances": torch.zeros(num_requests, MAX_COPIES),
    }
    with pytest.raises(ValueError, match=message):
        find_copies(**{**arguments, **change})
    assert (arguments["copies"] == POISON).all()

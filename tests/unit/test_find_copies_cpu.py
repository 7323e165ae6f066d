"""Copies on the host: the kernel against its twin, and what a request gets from its own text."""

import numpy as np
import pytest
import torch
from bita_kernels import cpu_kernels
from bita_kernels.find_copies_cpu_naive import find_copies_cpu_naive
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("two_threads")

DEPTH, POISON = 15, -7


class Index:
    """State of `slots` slots, full of poison where an index of nothing allows it."""

    def __init__(self, function, slots=4, max_len=200, heads=16, max_places=1000):
        assert cpu_kernels.register(), "it must be built here"
        self.function = torch.ops.bita.find_copies_cpu if function == "kernel" else function
        self.max_places = max_places
        self.head = torch.full((slots, 2, heads), POISON, dtype=torch.int32)
        self.previous = torch.full((slots, max_len), POISON, dtype=torch.int32)
        self.state = torch.zeros(slots, 4, dtype=torch.int32)

    def __call__(self, texts, slots=None):
        """(copies, lengths, outcomes) as lists."""
        token_ids = torch.full((len(texts) + 1, self.previous.shape[1]), POISON, dtype=torch.int32)
        for row, text in zip(token_ids, texts, strict=False):
            row[: len(text)] = torch.tensor(text, dtype=torch.int32)
        copies = torch.full((len(texts), DEPTH), POISON)
        length = torch.full((len(texts),), POISON)
        outcome = torch.full((len(texts), 2), POISON, dtype=torch.int32)
        slots = torch.tensor(range(len(texts)) if slots is None else slots)
        sizes = torch.tensor([len(text) for text in texts])
        self.function(
            token_ids, sizes, slots, self.max_places, self.head, self.previous, self.state, copies, length, outcome
        )  # fmt: skip
        return copies.tolist(), length.tolist(), outcome.tolist()


BOTH = pytest.mark.parametrize(
    "function", ["kernel", find_copies_cpu_naive], ids=["kernel", "twin"]
)


@BOTH
def test_the_tokens_after_the_longest_match_are_copied(function):
    #       a match of two, then one of three, which wins; then the text's end
    text = [1, 2, 8, 8, 5, 1, 2, 9, 9, 7, 7, 1, 2, 6, 5, 1, 2]
    copies, lengths, _ = Index(function)([text])
    assert lengths == [3]
    assert copies[0] == [9, 9, 7, 7, 1, 2, 6, 5, 1, 2, 9, 9, 7, 7, 1], "it goes on from its begin"


@BOTH
def test_of_equally_long_matches_the_last_one_is_copied(function):
    copies, lengths, _ = Index(function)([[1, 2, 3, 1, 2, 4, 1, 2]])
    assert (copies[0][:3], lengths) == ([4, 1, 2], [2])


@BOTH
def test_a_copy_that_comes_to_the_end_goes_on_with_its_own_tokens(function):
    copies, lengths, _ = Index(function)([[1, 2, 3, 1, 2, 3], [5] * 40])
    assert copies == [[1, 2, 3] * 5, [5] * DEPTH]
    assert lengths == [3, 32]


@BOTH
def test_where_no_two_tokens_match_the_last_place_of_the_last_one_is_copied(function):
    copies, lengths, _ = Index(function)([[2, 8, 1, 2, 9, 3, 2], [3, 3]])
    assert (copies[0][:4], copies[1], lengths) == ([9, 3, 2, 9], [3] * DEPTH, [1, 1])


@BOTH
@pytest.mark.parametrize("text", [[], [3], [1, 2, 3, 4, 5], [1, 2, 1, 3]], ids=str)
def test_without_a_match_there_is_no_copy(function, text):
    copies, lengths, outcomes = Index(function)([text])
    assert (copies, lengths, outcomes) == ([[0] * DEPTH], [0], [[0, 0]])


@BOTH
def test_what_became_of_the_last_copy_is_told(function):
    index, text = Index(function), [1, 2, 3, 4, 1, 2]
    (copy,), _, _ = index([text])
    assert copy[:4] == [3, 4, 1, 2]
    assert index([[*text, 3]])[2] == [[1, 0]]
    assert index([[*text, 3, 4, 1, 9, 9]])[2] == [[2, 1]]
    assert index([[*text, 3, 4, 1, 9, 9, 8]])[2] == [[0, 1]], "the copy of 9 was of 9"
    assert index([[*text, 3, 4, 1, 9, 9, 8, 9]])[2] == [[0, 0]], "there was none"


@BOTH
def test_another_text_in_a_slot_is_indexed_anew(function):
    index = Index(function)
    index([[1, 2, 3, 4, 1, 2]])
    copies, lengths, outcomes = index([[7, 8, 9, 6, 6, 3, 4, 7, 8]])
    assert (copies[0][:3], lengths, outcomes) == ([9, 6, 6], [2], [[0, 0]])
    assert index([[7, 8]])[1] == [0], "a shorter one, too"
    assert index([[7, 8, 1, 7, 8]])[0][0][0] == 1


@BOTH
def test_an_index_follows_its_request_to_another_row(function):
    index = Index(function)
    index([[1, 2, 3, 1, 2], [4, 5, 6, 4, 5]])
    _, lengths, outcomes = index([[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 8]], slots=[1, 0])
    assert lengths == [3, 0]
    assert outcomes == [[1, 0], [0, 1]]


TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=60), min_size=1, max_size=4)


@given(TEXTS, st.lists(st.integers(0, 60), max_size=3), st.sampled_from([1, 3, 1000]), st.randoms())
@settings(max_examples=150, deadline=None)
def test_kernel_and_twin_agree_step_by_step(texts, cuts, max_places, random):
    kernel = Index("kernel", max_places=max_places)
    twin = Index(find_copies_cpu_naive, max_places=max_places)
    slots = list(range(4))
    for cut in [*sorted(cuts), 60]:
        order = random.sample(range(len(texts)), len(texts))
        step = [texts[i][:cut] for i in order]
        own = [slots[i] for i in order]
        assert kernel(step, own) == twin(step, own)
        assert torch.equal(kernel.state, twin.state)


def test_a_text_indexed_token_by_token_gives_what_one_indexed_at_once_gives():
    text = np.random.default_rng(0).integers(0, 6, 190).tolist()
    grown = Index("kernel", heads=64)
    for size in range(2, len(text) + 1):
        assert grown([text[:size]])[:2] == Index("kernel", heads=64)([text[:size]])[:2]


def test_tables_that_do_not_fit_are_refused():
    index = Index("kernel", heads=12)
    with pytest.raises(RuntimeError, match="a power of two of entries"):
        index([[1, 2]])

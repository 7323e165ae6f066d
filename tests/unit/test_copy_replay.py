"""Replayed decoding with masks and copies in one block (benchmarks/testbed/copy_replay.py), and chances on answers."""

import numpy as np
import pytest
import spec_bench
from testbed.copy_replay import Copies, ExpectedTokens, MixedBlock, MixedWalker
from testbed.recorded_ranks import recorded_predictions

from bita_vllm.step.copy_chance import CopyChance
from bita_vllm.training.evaluate import accepted_lengths, chosen_lengths
from bita_vllm.tree import Template
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.template_set import TemplateSet

pytestmark = pytest.mark.usefixtures("two_threads")
TREE = Template.from_widths([2, 1, 1], 3)
WRONG = 9  # a rank that no tree has


def replayed(block, copies, ranks):
    return MixedWalker([block]).replay(np.array(ranks), copies, CopyChance(1))


def no_copies(num_tokens):
    nothing = np.zeros(num_tokens, dtype=np.int64)
    return Copies(nothing, nothing, nothing)


def test_the_source_is_asked_at_every_token_of_the_answer():
    copies = Copies.of([1, 2, 3, 4, 9], [1, 2, 3, 4, 5, 1, 2])
    assert copies.length.tolist() == [1, 2, 3, 4, 0, 1, 2]
    # the answer goes on as the prompt did until it says 5
    assert copies.taken.tolist() == [3, 2, 1, 0, 0, 1, 0]
    assert copies.known.tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_without_copies_masks_decode_as_ever():
    predictions = recorded_predictions("mt_bench")
    for ranks in predictions.ranks[:4]:
        assert (
            replayed(MixedBlock(TREE), no_copies(len(ranks)), ranks)
            == accepted_lengths(TREE, [ranks])[0]
        )


def test_copies_alone_emit_one_token_more_than_are_right():
    copies = Copies.of([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 9, 9])
    ranks = np.full((13, 3), WRONG)
    assert replayed(MixedBlock(None, 3), copies, ranks) == [4, 4, 3, 1]
    assert replayed(MixedBlock(None, 15), copies, ranks) == [11, 1]


def test_a_walk_that_ends_on_a_copy_goes_on_with_what_is_left_of_the_masks_above_or_with_its_own_group():
    ranks = np.full((9, 3), WRONG)
    ranks[0, 2] = 0  # the root's third mask knows token 4
    ranks[2, 0] = 0  # and so does the first one under the second copy
    taken = np.array([2, 0, 0, 0, 0, 0, 0, 0, 0])
    copies = Copies(np.full(9, 5), taken, np.full(9, 15))
    assert replayed(MixedBlock(TREE, 2), copies, ranks) == [3, 2, 1, 1, 1]
    ranks[0, 2] = WRONG
    assert replayed(MixedBlock(TREE, 2), copies, ranks) == [3, 1, 1, 1, 1, 1]
    assert replayed(MixedBlock(TREE, 2, {2: 1}), copies, ranks) == [3, 2, 1, 1, 1]


def test_a_step_takes_the_longer_of_tree_and_copies():
    ranks = np.full((12, 3), WRONG)
    ranks[0] = 0  # the group under the first token knows the three after the next
    taken = np.zeros(12, dtype=np.int64)
    copies = Copies(np.full(12, 5), taken, np.full(12, 15))
    assert replayed(MixedBlock(TREE, 7), copies, ranks) == [1, 4, *[1] * 6]
    taken[1], taken[5] = 1, 5
    # no candidates at first; then three of the tree against one copy, then five copies against nothing
    assert replayed(MixedBlock(TREE, 7), copies, ranks) == [1, 4, 6]


def test_where_no_copy_is_likely_the_choice_is_that_among_trees():
    predictions = recorded_predictions("mt_bench")
    table = acceptance_table(None, 3)
    trees = (TREE, Template.from_widths([1, 1, 1], 3), Template.from_widths([4], 3))
    choose = ExpectedTokens([MixedBlock(tree) for tree in trees], TREE, table)
    walker = MixedWalker([MixedBlock(tree) for tree in trees])
    wanted = chosen_lengths(TemplateSet(trees), table, predictions)
    for i in range(4):
        ranks, probabilities = predictions.ranks[i], predictions.probabilities[i]
        own = choose(probabilities)
        assert walker.replay(ranks, no_copies(len(ranks)), CopyChance(1), own) == wanted[i]


def test_likely_copies_are_chosen_and_unlikely_ones_are_not():
    blocks = [MixedBlock(TREE), MixedBlock(Template.from_widths([1], 2), 4)]
    choose = ExpectedTokens(blocks, TREE, acceptance_table(None, 3))(
        np.full((9, 3, 10), 0.1, dtype=np.float32)
    )
    for chance, wanted in ((0.95, 1), (0.0, 0)):
        assert choose(3, [(2, 0), (2, 1)], np.full(15, chance)) == wanted


def test_only_copies_whose_predecessors_were_right_are_judged():
    copies = Copies(np.array([4, 0, 2]), np.array([2, 0, 1]), np.array([5, 4, 1]))
    assert spec_bench.judged_copies(copies).tolist() == [
        [4, 0, 1, 0],
        [4, 1, 1, 0],
        [4, 2, 0, 0],
        [2, 0, 1, 2],
    ]

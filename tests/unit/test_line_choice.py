"""The tree that a block takes is the one that promises most, node by node."""

import numpy as np
import pytest
import torch
from tree_tools import ladder_of, probabilities_of

from bita_vllm.tree import Template
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.markov import state_values
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.shape import COPY_RANK, TreeBatch
from bita_vllm.tree.template_set import TemplateSet

K, RANKS = 3, 10


def made_up_acceptance() -> np.ndarray:
    """Another one after lower candidates than after top ones."""
    after_top = acceptance_table(None, K)[0, 0]
    after_lower = after_top * np.linspace(0.3, 1.6, RANKS)
    return np.tile([after_top, after_lower], (K, 1, 1, 1))


ACCEPTANCE = made_up_acceptance()
BROAD = Template.build([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)], {0: 3, 1: 1})
DEEP = Template.build([(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)], {0: 3, 3: 1})
LEAN = Template.build([(0, 0)], {0: 3, 1: 3})
FORK = Template.build([(0, 0), (0, 1), (2, 0), (2, 1), (1, 0)], {0: 3})
COPIES = Template.build([], {0: 2}, copies=6)
WIDE = Template.build([(0, 0), (0, 1), (1, 0)], {0: 3, 1: 3, 2: 2})
BESIDE = Template.build([(0, 0)], {0: 2, 3: 2}, copies=3)
SETS = [
    TemplateSet((BROAD, DEEP, LEAN, FORK)),
    TemplateSet((WIDE, COPIES, BESIDE)),
    TemplateSet((Template.from_widths([5, 4, 3], K), DEEP)),
]
LADDER = ladder_of(SETS)
TABLE = LADDER.table
CHOICE = LineChoice(LADDER, ACCEPTANCE, torch.device("cpu"))


def promise(template, first, depths, probabilities):
    """Row by row: P(reached) and what a walk that stops there brings, predictions for later included."""
    value = state_values(TreeBatch.of([first.shape]), ACCEPTANCE)
    cut = template.restrict(depths)
    state = TreeBatch.of([cut.shape]).next_state(K)[0]
    reach = [1.0]
    for node in range(1, cut.num_nodes):
        is_copy = cut.rank[node] == COPY_RANK
        place = cut.depth[node] - 1, TABLE.max_rank if is_copy else cut.rank[node]
        accepted = probabilities[place]
        if cut.rank[cut.parent[node]] > 0 and not is_copy:
            accepted *= ACCEPTANCE[0, 1][place] / ACCEPTANCE[0, 0][place]
        reach.append(reach[cut.parent[node]] * accepted)
    stop = reach.copy()
    for node in range(1, cut.num_nodes):
        stop[cut.parent[node]] -= reach[node]
    is_copy = cut.rank[: cut.num_nodes] == COPY_RANK
    if not is_copy.any():
        return sum(reach) + sum(s * value[x] for s, x in zip(stop, state, strict=True))
    total = reach[0] + value[state[0]]
    for node in range(1, cut.num_nodes):
        brings = 1 + value[state[node]] - value[state[cut.parent[node]]]
        by_masks = sum(
            r
            for r, d, copied in zip(reach, cut.depth, is_copy, strict=False)
            if d == cut.depth[node] and not copied
        )
        total += reach[node] * brings * (1 - min(by_masks, 1) if is_copy[node] else 1)
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_line_promises_most(seed):
    rng = np.random.default_rng(seed)
    index = seed % 3
    templates = SETS[index].templates
    num_requests, deepest = 30, TABLE.max_depth
    depths = rng.integers(0, SETS[index].mask_depth + 1, num_requests)
    probabilities = np.sort(rng.dirichlet([0.3] * 12, (num_requests, deepest)))[..., :1:-1]
    probabilities = np.ascontiguousarray(probabilities[..., :RANKS], dtype=np.float32)
    probabilities[..., TABLE.max_rank] = rng.random((num_requests, deepest))
    given = probabilities.copy()
    of_masks = np.arange(RANKS) != TABLE.max_rank
    # no candidates: anything may stand there
    given[(np.arange(deepest) >= depths[:, None])[..., None] & of_masks] = np.nan
    lines = CHOICE(index, torch.from_numpy(depths), torch.from_numpy(given))
    first = sum(len(one.templates) for one in SETS[:index])
    for request, line in enumerate(lines.tolist()):
        promised = [
            promise(
                t, SETS[index].first, min(depths[request], t.mask_depth), probabilities[request]
            )
            for t in templates
        ]
        own = [
            TABLE.first_line[first + i] + min(depths[request], t.mask_depth)
            for i, t in enumerate(templates)
        ]
        assert promised[own.index(line)] == pytest.approx(max(promised), abs=1e-5)


def test_sure_masks_get_a_deep_tree_and_unsure_ones_a_broad_one():
    sure = torch.zeros(1, 3, RANKS)
    sure[..., 0] = 0.95
    unsure = torch.full((1, 3, RANKS), 0.1)
    depths = torch.tensor([3, 3])
    deep, broad = CHOICE(0, depths, torch.cat([sure, unsure])).tolist()
    assert deep == TABLE.first_line[1] + 3
    assert broad == TABLE.first_line[0] + 2


def test_a_set_of_one_has_no_choice():
    depths = torch.tensor([0, 1, 2, 3])
    only = LineChoice(ladder_of([TemplateSet((BROAD,)), SETS[1]]), ACCEPTANCE, torch.device("cpu"))
    lines = only(0, depths, torch.full((4, 3, RANKS), torch.nan))
    assert lines.tolist() == [0, 1, 2, 2]  # BROAD is two deep


def test_probabilities_are_those_of_a_softmax():
    logits = torch.randn(4, 50, dtype=torch.float64).float()
    top = logits.topk(5)
    want = logits.double().softmax(-1).gather(1, top.indices)
    torch.testing.assert_close(probabilities_of(top.values, logits).double(), want)


def test_values_of_states_by_hand():
    template = Template.from_widths([3, 2], 2)
    acceptance = acceptance_table({"rank_probability": [[0.5, 0.1, 0.1], [0.3, 0.1, 0.05]]}, 2)
    value = state_values(TreeBatch.of([template.shape]), acceptance)
    # By hand: every node has a full group, so every state is followed by {0, 1}, and only this step differs.
    p, q = np.array([0.5, 0.1, 0.1]), np.array([0.3, 0.1])
    full = p.sum() + p[0] * q.sum()
    first_only = p.sum()
    second_only = q.sum() + 0.05  # one depth, whose three candidates are M2's
    np.testing.assert_allclose(value, [0.0, first_only, second_only, full], atol=1e-12)


def test_candidates_that_are_always_right_leave_a_choice():
    certain = acceptance_table({"rank_probability": [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]}, K)
    choice = LineChoice(LADDER, certain, torch.device("cpu"))
    assert bool(choice.weight.isfinite().all())

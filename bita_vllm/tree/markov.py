"""The decoding process of a template as a Markov chain, for many templates at once (NumPy only).

Where a walk stops decides which mask predictions give the next block's candidates. What a step starts
with is a *set of mask indices*: the predictions that are still ahead, ascending; the d-th smallest gives
the candidates at depth d. A walk that stops at a node with a mask group of g rows goes on with
{0, ..., g-1} and, beyond depth g, with what is left of the parent's set: all of it but its g+1 smallest
(`Template.candidate_rows`). A set is a bit mask here: bit j for mask index j.

Acceptance goes by age: a mask index j that gives depth d is j-d+1 tokens old, 0 from the node's own group;
an older prediction is a worse one. And it goes by the parent: where the token before was not the top
candidate of its parent, what the mask says after it is far less often right (measured on SmolLM2-135M: 0.35
against 0.19 for M2's top candidate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bita_vllm.tree.shape import COPY_RANK, TreeBatch

# Steps until the distribution of states is the stationary one: 2**6, by squaring.
NUM_SQUARINGS = 6
NEVER = 1e-12  # share of the steps


@dataclass(frozen=True)
class LongRun:
    """What the process comes to in the long run, by template.

    Attributes:
        accepted_length: `[C]` tokens emitted a step.
        rows: `[C]` rows of a step, where blocks are cut to the depths that have candidates.
    """

    accepted_length: np.ndarray
    rows: np.ndarray


def long_run(
    trees: TreeBatch,
    # [ages, 2, k, ranks] P(candidate of that rank is the token | the tokens before it were accepted);
    # axis 1: the parent is a root or a top candidate, the parent is a lower one
    acceptance: np.ndarray,
) -> LongRun:
    """Exact for the chain: the distribution over states that steps settle in, and its expectations."""
    states, share, reach = _settled(trees, acceptance)
    depth = trees.depth()
    is_node = trees.rank >= 0
    is_node[:, 0] = True
    rows_of_node = np.where(is_node, 1 + trees.group, 0)
    rows = np.zeros(share.shape)
    for i, size in enumerate(np.bitwise_count(states)):
        rows[:, i] = (rows_of_node * (depth <= size)).sum(axis=1)
    return LongRun((share * reach.sum(axis=0)).sum(axis=1), (share * rows).sum(axis=1))


def reach_by_depths(
    trees: TreeBatch,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> np.ndarray:
    """`[C, k+1, N]` P(the walk reaches the node | so many depths have candidates); NaN where that never happens."""
    states, share, reach = _settled(trees, acceptance)
    deepest = trees.depth().max(axis=1)
    depths = np.minimum(np.bitwise_count(states), deepest[:, None])  # [C, S]
    found = np.full((len(share), acceptance.shape[2] + 1, len(reach)), np.nan)
    for num in range(acceptance.shape[2] + 1):
        weight = share * (depths == num)
        total = weight.sum(axis=1)
        seen = total > NEVER
        found[seen, num] = ((reach * weight).sum(axis=-1)[:, seen] / total[seen]).T
    return found


def _settled(
    trees: TreeBatch,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[S]` states, `[C, S]` their share of the steps in the long run, `[N, C, S]` P(node reached | state)."""
    next_state = trees.next_state(acceptance.shape[2])
    states = np.unique(np.append(0, next_state))  # 0: no candidates
    reach, move = _chain(trees, states, next_state, acceptance)
    for _ in range(NUM_SQUARINGS):
        move = move @ move
    return states, move[:, 0], reach  # from no candidates on


def state_values(
    tree: TreeBatch,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> np.ndarray:
    """`[2**k]` tokens that decoding with one template gains over time by having a set of predictions, not none.

    The relative values of the chain with tokens as rewards: value(s) = tokens(s) - tokens a step in the long run
    + value of what comes next.
    """
    states = np.arange(1 << acceptance.shape[2])
    reach, move = _chain(tree, states, tree.next_state(acceptance.shape[2]), acceptance)
    equations = np.eye(len(states)) - move[0]
    equations[:, 0] = 1.0  # value(no predictions) is 0; in its place the tokens a step are unknown
    # Least squares: statistics in which a candidate is always right may leave states without a way to each other.
    values = np.linalg.lstsq(equations, reach[:, 0].sum(axis=0))[0]
    values[0] = 0.0
    return values


def promise_weight(
    trees: TreeBatch,
    # [2**k] of `state_values`
    value: np.ndarray,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> np.ndarray:
    """`[C, N]` weight of a node's probability in a template's promise (`choice.py`).

        weight = worth(node) * product over the path's nodes n of q(n)
        q(n) = P(n is right | its parent is a lower candidate) / P(n is right | its parent is a top candidate)
               if n's parent is a lower candidate, else 1, as for a copy

    The ratio q corrects the masks' probabilities: a mask does not know which token comes before its own.
    """
    after_top, after_lower = acceptance[0]  # [k, ranks]
    ratio = np.divide(after_lower, after_top, out=np.ones_like(after_top), where=after_top > 0)
    num_trees, num_nodes = trees.parent.shape
    depth, line = trees.depth(), np.arange(num_trees)
    is_copy = trees.rank == COPY_RANK
    rank = np.minimum(trees.rank, acceptance.shape[3] - 1)  # a tree may reach further
    of_mask = np.minimum(depth - 1, acceptance.shape[2] - 1)  # copies reach further
    often = np.ones((num_trees, num_nodes))
    for node in range(1, num_nodes):
        parent = trees.parent[:, node]
        is_lower = (rank[line, parent] > 0) & ~is_copy[:, node]
        own = np.where(is_lower, ratio[of_mask[:, node], rank[:, node]], 1.0)
        often[:, node] = often[line, parent] * own
    return often * _node_worth(trees, value)


def _node_worth(
    trees: TreeBatch,
    # [2**k] of `state_values`
    value: np.ndarray,
) -> np.ndarray:
    """`[C, N]` tokens that reaching a node brings: one, and what its predictions are worth over its parent's.

    The root's parent has none.
    """
    value_at = value[trees.next_state(len(value).bit_length() - 1)]
    worth = 1.0 + value_at
    worth[:, 1:] -= np.take_along_axis(value_at, trees.parent[:, 1:], axis=1)
    return worth


def _chain(
    trees: TreeBatch,
    # [S] ascending
    states: np.ndarray,
    # [C, N], all in `states`
    next_state: np.ndarray,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`[N, C, S]` P(node reached | state), and `[C, S, S]` P(state of the next step | state)."""
    num_trees, num_nodes = trees.parent.shape
    line = np.arange(num_trees)
    depth = trees.depth()
    next_index = np.searchsorted(states, next_state)
    accept = _accept_by_state(states, acceptance)  # [S, 2, k+1, ranks+1]
    last = accept.shape[3] - 1  # padding, and ranks that the statistics do not reach
    rank = np.where(trees.rank >= 0, np.minimum(trees.rank, last), last)

    reach = np.zeros((num_nodes, num_trees, len(states)))
    reach[0] = 1.0
    stop = reach.copy()
    for node in range(1, num_nodes):
        parent = np.maximum(trees.parent[:, node], 0)
        lower = (trees.rank[line, parent] > 0).astype(np.int64)
        reach[node] = reach[parent, line] * accept[:, lower, depth[:, node], rank[:, node]].T
        stop[node] += reach[node]
        stop[parent, line] -= reach[node]
    move = np.zeros((num_trees, len(states), len(states)))
    for node in range(num_nodes):
        move[line, :, next_index[:, node]] += stop[node]
    return reach, move


def _accept_by_state(
    # [S] sets of mask indices
    states: np.ndarray,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> np.ndarray:
    """`[S, 2, k+1, ranks+1]` acceptance at each depth (1 to k) by rank; 0 without candidates, 0 at the last rank."""
    ages, _, num_masks, ranks = acceptance.shape
    found = np.zeros((len(states), 2, num_masks + 1, ranks + 1))
    for i, state in enumerate(states.tolist()):
        masks = [j for j in range(num_masks) if state >> j & 1]
        for depth, mask in enumerate(masks, start=1):
            found[i, :, depth, :ranks] = acceptance[min(mask - depth + 1, ages - 1), :, mask]
    return found

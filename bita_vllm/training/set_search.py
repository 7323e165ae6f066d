"""Finds the trees of a template set: those whose best promise, block by block, is greatest on recorded answers.

The first is the best template on its own. Each further one is moved about, node by node and mask row by mask
row, as long as the mean over recorded blocks of the best promise grows (`tree/choice.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bita_vllm.training.evaluate import Predictions, accepted_lengths, chosen_lengths
from bita_vllm.tree import Template
from bita_vllm.tree.markov import promise_weight, state_values
from bita_vllm.tree.replay import Sources, TreeWalker
from bita_vllm.tree.search import acceptance_table, best_templates
from bita_vllm.tree.shape import TreeBatch, TreeShape
from bita_vllm.tree.template_set import TemplateSet

MIN_TOKENS = 4000  # of answers
NUM_TEMPLATES = 8
NUM_BLOCKS = 1000  # recorded blocks that trees are tried on
MAX_MOVES = 1500  # trees tried at a time
MAX_ROUNDS = 12
MIN_GAIN = 5e-4  # tokens a step that a further template has to promise
MIN_LENGTH_GAIN = 1.002  # below which the first template alone is kept


def find_sets(
    budgets: Iterable[int], acceptance: Mapping[str, Any], predictions: Predictions
) -> dict[str, Any]:
    """By row budget, the sets in their JSON form, for the adapter's statistics; none where a choice gains nothing.

    Too few answers leave it open which trees are good: then there are none at all.
    """
    if sum(map(len, predictions.ranks)) < MIN_TOKENS:
        return {}
    table = acceptance_table(acceptance, predictions.ranks[0].shape[1])
    sizes = sorted(set(budgets))
    firsts = zip(sizes, best_templates(sizes, table), strict=True)
    with tqdm(firsts, total=len(sizes), desc="finding trees", unit="budget") as bar:
        sets = {rows: find_set(first, table, predictions) for rows, first in bar}
    return {str(rows): found.to_dict() for rows, found in sets.items() if found.has_choice}


def find_set(
    first: Template,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    predictions: Predictions,
    num_templates: int = NUM_TEMPLATES,
    seed: int = 0,
) -> TemplateSet:
    """The set that begins with `first`, with its gain on the answers that the predictions are of."""
    rng = np.random.default_rng(seed)
    blocks = recorded_blocks(first, predictions, rng)
    num_masks, num_ranks = acceptance.shape[2:]
    value = state_values(TreeBatch.of([first.shape]), acceptance)
    found = [first.shape]
    best = promises(found, blocks, value, acceptance)[0]
    while len(found) < num_templates and len(best):
        promise, origins = best, found
        for _ in range(MAX_ROUNDS):
            moved = _moved(origins, first.num_rows, num_masks, num_ranks, rng)
            scores = promises(moved, blocks, value, acceptance)
            total = np.maximum(scores, best).mean(axis=1)
            winner = int(total.argmax())
            if total[winner] <= np.maximum(promise, best).mean() + MIN_GAIN / 4:
                break
            promise, origins = scores[winner], [moved[winner]]
        if np.maximum(promise, best).mean() < best.mean() + MIN_GAIN:
            break
        found += origins
        best = np.maximum(promise, best)
    templates = (first, *map(Template.of_shape, found[1:]))
    alone = _mean(accepted_lengths(first, predictions.ranks))
    together = _mean(chosen_lengths(TemplateSet(templates), acceptance, predictions))
    if together < MIN_LENGTH_GAIN * alone:
        return TemplateSet((first,))
    return TemplateSet(templates, together / alone)


def recorded_blocks(
    template: Template, predictions: Predictions, rng: np.random.Generator
) -> np.ndarray:
    """`[depths + 1, ranks + 1, N]` P(candidate) in some of the blocks that decoding with a template comes to.

    Depth 0, the last rank and depths without candidates hold zeros.
    """
    walker = TreeWalker(template)
    seen: list[tuple[int, Sources]] = []
    for answer, ranks in enumerate(predictions.ranks):

        def note(sources: Sources, answer: int = answer) -> int:
            if sources:
                seen.append((answer, sources))
            return 0

        walker.replay(ranks, note)
    num_masks, num_ranks = predictions.probabilities[0].shape[1:]
    chosen = rng.permutation(len(seen))[:NUM_BLOCKS]
    blocks = np.zeros((num_masks + 1, num_ranks + 1, len(chosen)), dtype=np.float32)
    for column, index in enumerate(chosen.tolist()):
        answer, sources = seen[index]
        for depth, (place, mask) in enumerate(sources, start=1):
            blocks[depth, :num_ranks, column] = predictions.probabilities[answer][place, mask]
    return blocks


def promises(
    shapes: Sequence[TreeShape],
    # [depths + 1, ranks + 1, N]
    blocks: np.ndarray,
    # [2**k]
    value: np.ndarray,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> np.ndarray:
    """`[C, N]` tokens that each tree promises in each block, now and later."""
    trees = TreeBatch.of(shapes)
    num_trees, num_nodes = trees.parent.shape
    depth, weight = trees.depth(), promise_weight(trees, value, acceptance)
    rank = np.where(trees.rank >= 0, trees.rank, blocks.shape[1] - 1)
    line = np.arange(num_trees)
    reach = np.zeros((num_nodes, num_trees, blocks.shape[2]), dtype=np.float32)
    reach[0] = 1.0
    total = np.repeat(weight[:, :1], blocks.shape[2], axis=1)
    for node in range(1, num_nodes):
        parent = trees.parent[:, node]
        reach[node] = reach[parent, line] * blocks[depth[:, node], rank[:, node]]
        total += reach[node] * weight[:, node, None]
    return total


def _moved(
    shapes: Sequence[TreeShape],
    max_rows: int,
    num_masks: int,
    num_ranks: int,
    rng: np.random.Generator,
) -> list[TreeShape]:
    """Trees with something taken away and something else put in its place; some of them if there are many."""
    moved = list(
        dict.fromkeys(
            again
            for shape in shapes
            for less in (shape, *shape.shrunk())
            for again in less.grown(num_masks, num_ranks, max_rows)
        )
    )
    return [moved[i] for i in rng.permutation(len(moved))[:MAX_MOVES].tolist()]


def _mean(lengths: Sequence[Sequence[int]]) -> float:
    return sum(map(sum, lengths)) / max(sum(map(len, lengths)), 1)

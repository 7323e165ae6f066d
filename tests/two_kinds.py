"""Answers whose masks are sure in places and unsure in others, drawn at random."""

import numpy as np

from bita_vllm.training.evaluate import NUM_RANKS, Predictions
from bita_vllm.tree.replay import NO_RANK

K = 3


def predictions(num_answers=6, answer_len=400, seed=0, two_kinds=True):
    """Half of the places have masks that are nearly always right and say so, half have flat ones."""
    rng = np.random.default_rng(seed)
    found = Predictions([], [])
    flat = np.full(NUM_RANKS, 0.08)
    sharp = np.array([0.95, 0.03, *[0.001] * (NUM_RANKS - 2)])
    for _ in range(num_answers):
        # Sure and unsure places come in runs, as in text.
        sure = np.repeat(rng.random(answer_len // 20) < 0.5, 20) & two_kinds
        probabilities = np.where(sure[:, None, None], sharp, flat).repeat(K, axis=1)
        draws = rng.random((answer_len, K, 1))
        ranks = (draws > probabilities.cumsum(axis=2)).sum(axis=2)
        ranks = np.where(ranks == NUM_RANKS, 1000, ranks).astype(np.int32)
        for j in range(K):
            ranks[answer_len - 2 - j :, j] = NO_RANK
        found.ranks.append(ranks)
        found.probabilities.append(probabilities.astype(np.float32))
    return found

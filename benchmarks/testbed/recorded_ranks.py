"""Ranks of answers' tokens in mask predictions, and candidates' probabilities, recorded once: what is replayed."""

from pathlib import Path

import numpy as np

from bita_vllm.training.evaluate import Predictions

FILE = Path(__file__).parents[2] / "tests" / "data" / "answer_ranks.npz"
PROBABILITIES = FILE.with_name("answer_probabilities.npz")
PER_NAT = 16  # recorded as whole sixteenths of a nat, up to 255


def recorded_ranks(name: str) -> list[np.ndarray]:
    """Each answer's `[n, 3]` ranks; 'mt_bench' or 'own_prompts' (data/README.md)."""
    with np.load(FILE) as file:
        return np.split(file[name].astype(np.int32), np.cumsum(file[f"{name}_lengths"])[:-1])


def recorded_predictions(name: str) -> Predictions:
    """The same answers with the probabilities of each mask's ten candidates, `[n, 3, 10]`, to 3%."""
    ranks = recorded_ranks(name)
    with np.load(PROBABILITIES) as file:
        recorded = file[name]
    probabilities = np.exp(recorded / -PER_NAT, dtype=np.float32)
    probabilities[recorded == 255] = 0.0
    return Predictions(ranks, np.split(probabilities, np.cumsum([len(r) for r in ranks])[:-1]))

"""Ranks of answers' tokens in mask predictions, recorded once: what the simulator replays."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "answer_ranks.npz"


def recorded_ranks(name: str) -> list[np.ndarray]:
    """Each answer's `[n, 3]` ranks; 'mt_bench' or 'own_prompts' (data/README.md)."""
    with np.load(FILE) as file:
        return np.split(file[name].astype(np.int32), np.cumsum(file[f"{name}_lengths"])[:-1])

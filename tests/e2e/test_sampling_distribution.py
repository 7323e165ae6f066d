"""Sampled tokens are exact draws from the base model's distribution, accepted drafts too.

A vocabulary of 16 tokens: half of them are candidates, so that most walks go deep.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter
from e2e.inspection import StepRecord, recorded_steps
from scipy.stats import chi2, chisquare
from testbed.engines import engine, torch_threads
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from bita_vllm.tree import Template

VOCAB_SIZE = 16
PROMPT = [5, 9, 3, 12]
NUM_DRAWS = 20_000
MAX_TOKENS = 12

TREE = Template.build(
    [(0, rank) for rank in range(8)] + [(1, 0), (1, 1), (1, 2), (2, 0)],
    {0: 2, **dict.fromkeys(range(1, 9), 2)},
)

SETTINGS = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}


def target(model, sequences: np.ndarray, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """`[sequences, length, V]` distribution of the token after each prefix, by transformers."""
    batches = torch.from_numpy(sequences).split(512)
    with torch.inference_mode(), torch_threads(1):
        logits = torch.cat([model(batch).logits for batch in batches]).double()
    p = (logits / temperature).softmax(-1).numpy()
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, axis=-1)
    kept = np.cumsum(ranked, axis=-1) - ranked < top_p  # mass of the likelier ones
    np.put_along_axis(p, order, ranked * kept, axis=-1)
    return p / p.sum(-1, keepdims=True)


def draws(steps: list[StepRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences `[requests, length]`, padded, and (sequence, place, depth in the tree) `[draws, 3]`.

    Draws of steps that had drafts: the root's (depth 0), and those after accepted drafts.
    """
    sequences: dict[str, list[int]] = {}
    places = []
    for step in steps:
        tokens = sequences.setdefault(step.request, list(PROMPT))
        if step.line > 0:
            places += [(step.request, len(tokens) + d, d) for d in range(len(step.tokens))]
        tokens += step.tokens
    index = {request: i for i, request in enumerate(sequences)}
    length = max(map(len, sequences.values()))
    padded = np.zeros((len(sequences), length), dtype=np.int64)
    for request, tokens in sequences.items():
        padded[index[request], : len(tokens)] = tokens
    return padded, np.array([(index[request], place, d) for request, place, d in places])


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_accepted_tokens_are_exact_draws(tiny_model, tmp_path, params):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    bita = {
        "model": str(make_adapter(model, tmp_path / "adapter")),
        "tree": str(tmp_path / "tree.json"),
    }
    TREE.save(tmp_path / "tree.json")
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, **params)
    found: list[StepRecord] = []
    with recorded_steps() as steps, engine(model, bita, max_num_seqs=64, seed=1) as llm:
        while sum(len(step.tokens) for step in found if step.line > 0) < NUM_DRAWS:
            generate(llm, [(PROMPT, sampling)] * 256)
            found = list(steps)

    with_drafts = [step for step in found if step.line > 0]
    accepted = np.mean([len(step.tokens) > 1 for step in with_drafts])
    sequences, places = draws(found)
    places = places[:NUM_DRAWS]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    p = target(reference, sequences, **params)
    row, place, depth = places.T
    tokens, p = sequences[row, place], p[row, place - 1]

    # Each draw's place in its own distribution, likeliest token first, is uniform.
    drawn = np.take_along_axis(p, tokens[:, None], 1)
    assert (drawn > 0).all(), "a token that the target cannot emit"
    noise = np.random.default_rng(0).random(NUM_DRAWS)
    uniform = np.where(p > drawn, p, 0).sum(1) + noise * drawn[:, 0]
    p_values = {
        name: chisquare(np.histogram(part, bins=20, range=(0, 1))[0]).pvalue
        for name, part in {"all": uniform, "after accepted": uniform[depth > 0]}.items()
    }

    # And the counts of tokens after each prefix, where there are enough of them.
    prefixes: dict[bytes, list[int]] = {}
    for i in range(NUM_DRAWS):
        prefixes.setdefault(sequences[row[i], : place[i]].tobytes(), []).append(i)
    statistic, freedom = 0.0, 0
    for members in prefixes.values():
        expected = p[members[0]] * len(members)
        cells = expected >= 5
        if len(members) < 50 or cells.sum() < 2:
            continue
        counts = np.bincount(tokens[members], minlength=VOCAB_SIZE)
        observed, expected = (
            np.append(x[cells], x[~cells].sum()) for x in (counts.astype(float), expected)
        )
        used = expected > 1  # the rest of the cells in one, if it weighs anything
        statistic += ((observed - expected)[used] ** 2 / expected[used]).sum()
        freedom += int(used.sum()) - 1
    p_values[f"by prefix, {freedom} degrees of freedom"] = chi2.sf(statistic, freedom)
    print(f"{NUM_DRAWS} draws, {(depth > 0).sum()} of them after accepted drafts")
    print(f"drafts accepted in {accepted:.0%} of steps; p-values {p_values}")
    assert accepted > 0.5
    assert freedom >= 20
    assert min(p_values.values()) > 0.01

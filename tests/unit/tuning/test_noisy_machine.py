"""The online policy next to a neighbour that takes a core in bursts: drafts stay where they pay, and only there."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tree_tools import long_run_of, sets_of_one

from bita_vllm.scheduling.online import WidthPolicy
from bita_vllm.training.evaluate import acceptance_statistics
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table, best_templates
from bita_vllm.tree.step_cost import MeasuredCost
from bita_vllm.tuning.simulator import simulate, synthetic_traces

MASKS = (0.6, 0.4, 0.28)
PLAIN_STEP = 0.02  # seconds
CORES = 2


@cache
def load():
    """(answers, acceptance, template, its accepted length on them, its mean rows)"""
    traces = synthetic_traces(MASKS, 80, 256, seed=0)
    acceptance = acceptance_table(acceptance_statistics(traces), 3)
    (template,) = best_templates([8], acceptance)
    run = long_run_of(template, acceptance)
    return traces, acceptance, template, float(run.accepted_length[0]), float(run.rows[0])


def bursts(seed=0, steps=20_000):
    """`[steps, 2]` seconds over a quiet machine's and CPU seconds a second: bursts of 1 to 4 s, 2 to 8 s apart."""
    rng = np.random.default_rng(seed)
    factor = np.exp(0.02 * rng.standard_normal(steps))
    busy = np.full(steps, 0.92 * CORES)
    start = 0
    while start < steps:
        start += int(rng.uniform(2, 8) / PLAIN_STEP)
        end = start + int(rng.uniform(1, 4) / PLAIN_STEP)
        shared = factor[start:end]
        slower = rng.uniform(1.0, 2.2, len(shared))
        factor[start:end] *= slower
        busy[start:end] /= slower  # the same work in more time
        start = end
    return np.stack([factor, busy], axis=1)


def recorded():
    """The same of a real engine's steps: `benchmarks/record_noise.py`."""
    with np.load(Path(__file__).parents[2] / "data" / "noisy_steps.npz") as data:
        return data["noise"].astype(float)


def cost_of(gain):
    """Steps of a block take so long that the drafts bring this gain."""
    _, _, _, length, rows = load()
    return MeasuredCost([(1, 1, PLAIN_STEP), (1, rows, PLAIN_STEP * length / gain)])


def test_what_was_recorded_is_noise():
    """A neighbour had half a core: some steps lacked CPU time, and took longer."""
    factor, busy = recorded().T
    lacking = busy < 0.9 * np.quantile(busy, 0.9)
    assert 0.1 < lacking.mean() < 0.9
    assert np.median(factor[lacking]) > 1.1 * np.median(factor[~lacking])


CASES = [(1.06, 1.06), (1.05, 1.03), (1.3, 1.3), (1.3, 1.06), (1.06, 0.9), (1.05, 0.95), (1.3, 0.9)]


@pytest.mark.parametrize(("promised", "gain"), CASES)
def test_drafts_are_served_where_they_pay(promised, gain):
    share = share_of_drafts(promised, gain, bursts())
    assert share > 0.97 if gain > 1 else share < 0.2


@pytest.mark.parametrize(("promised", "gain"), CASES)
def test_a_wrong_decision_costs_next_to_nothing(promised, gain):
    """Steps of a machine drift, so a gain of a few percent is not always seen; what that costs is bounded."""
    share = share_of_drafts(promised, gain, recorded())
    lost = (1 - share) * (gain - 1) if gain > 1 else share * (1 - gain)
    assert lost < 0.02


def share_of_drafts(promised, gain, noise):
    """Of the steps, how many were decided to have drafts."""
    traces, acceptance, template, _, _ = load()
    ladder = Ladder(sets_of_one([template]), [(1, 1, template.width), (2, 2, 0)])
    policy = WidthPolicy(ladder, acceptance, cost_of(promised), 2, now=0.0)
    widths, review = [], policy.review

    def reviewing(now):
        widths.append(policy.lookup[1])
        return review(now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "review", reviewing)
        simulate(ladder, traces, cost_of(gain), 1, num_walks=30_000, policy=policy, noise=noise)
    share = np.mean(np.array(widths) > 0)
    print(f"promised {promised}, gain {gain}: drafts in {share:.3f} of the steps")
    return share

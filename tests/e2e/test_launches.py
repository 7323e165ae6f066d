"""Launches of a step around the forward pass, bita's compared with plain V2's: a small model's step is bound by them.

`pytest --runner gpu -s tests/e2e/test_launches.py` prints the table.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from e2e.engines import generate, make_adapter
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import TemplateSet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
OPTIONS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 48}
TREE = Template.from_widths([3, 2], 3)
SET = TemplateSet((TREE, Template.build([(0, 0), (1, 0), (2, 0)], {0: 3, 1: 3})))
PARTS = ("begin", "sample", "propose")
GREEDY = {"temperature": 0}
PENALTIES = {"temperature": 0, "repetition_penalty": 1.3}


def launches_of_a_step(model, bita, sampling) -> Counter:
    """Of a step in the middle of one request's answer."""
    from e2e.launches import counted_launches

    prompt = np.random.default_rng(0).integers(3, 500, 9).tolist()
    params = SamplingParams(max_tokens=12, ignore_eos=True, **sampling)
    with engine(model, bita, **OPTIONS) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        with counted_launches(runner.model) as launches:
            generate(llm, [(prompt, params)])
    *_, step, _ = launches.steps
    return step


@pytest.fixture(scope="module")
def steps(tiny_model, tmp_path_factory):
    """Counts by name."""
    model = tiny_model("llama", num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("launches")
    adapter = make_adapter(model, folder / "adapter")
    deltas = make_adapter(model, folder / "deltas", lora_rank=4)
    found = {}
    for name, trees in {"one tree": TemplateSet((TREE,)), "set": SET}.items():
        ladder = folder / f"{name}.json"
        Ladder.fixed(trees).save(ladder)
        found[name] = {"model": str(adapter), "ladder": str(ladder)}
    found["set, copies"] = {**found["set"], "copies": True}
    found["set, deltas"] = {"model": str(deltas), "ladder": str(ladder)}
    counts = {name: launches_of_a_step(model, bita, GREEDY) for name, bita in found.items()}
    counts["plain"] = launches_of_a_step(model, None, GREEDY)
    counts["penalties, one tree"] = launches_of_a_step(model, found["one tree"], PENALTIES)
    counts["penalties, plain"] = launches_of_a_step(model, None, PENALTIES)
    print()
    for name, step in counts.items():
        parts = sorted({part for part, _ in step})
        row = (f"{part} {step[part, 'aten']} + {step[part, 'Triton']}" for part in parts)
        print(f"{name} (aten + Triton): {'; '.join(row)}; sum {step.total()}")
    return counts


def ours(step: Counter) -> int:
    return sum(count for (part, _), count in step.items() if part in PARTS)


@pytest.mark.parametrize("name", ["one tree", "set", "set, copies", "set, deltas"])
def test_a_step_launches_little_more_than_plain_vllms(steps, name):
    assert ours(steps[name]) - ours(steps["plain"]) <= 4
    assert steps[name].total() - steps["plain"].total() <= 4


def test_penalties_add_a_few_launches_for_each_depth(steps):
    """The sampler runs once a depth, with two launches of ours around it."""
    sampler = ours(steps["penalties, plain"])
    calls = TREE.max_depth + 1
    assert ours(steps["penalties, one tree"]) <= calls * sampler + 10

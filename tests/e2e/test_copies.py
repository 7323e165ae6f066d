"""Copies beside masks in one block: tokens stay plain vLLM's, and copies are drafted and accepted."""

from __future__ import annotations

import numpy as np
import pytest
from e2e.engines import NEAR_TIE, differences, generate, make_adapter, metric, run
from e2e.inspection import recorded_steps
from testbed.engines import engine
from vllm import SamplingParams

from bita_vllm.step.settings import BitaSettings
from bita_vllm.tree.shape import COPY_RANK

VOCAB_SIZE = 12  # so small that texts repeat themselves
OPTIONS = {
    "max_num_seqs": 6,
    "enable_prefix_caching": True,
    "max_model_len": 256,
    "num_gpu_blocks_override": 12,
}


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    return model, str(make_adapter(model, tmp_path_factory.mktemp("copies") / "adapter"))


def make_requests():
    """Greedy, seeded, penalised, stopped; prefixes in common."""
    rng = np.random.default_rng(5)
    common = rng.integers(3, VOCAB_SIZE, 40).tolist()
    kinds = (
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "min_tokens": 5, "stop_token_ids": [4]},
    )
    requests = []
    for i in range(20):
        prompt = rng.integers(3, VOCAB_SIZE, rng.integers(1, 30)).tolist() * (1 + i % 3)
        if i % 4 == 0:
            prompt = common + prompt
        requests.append((prompt, SamplingParams(**kinds[i % len(kinds)], max_tokens=60)))
    return requests


def copied_steps(settings: BitaSettings, steps):
    """(copies that a block had, copies that its walk took) of every block that had some."""
    table = settings.ladder.table
    for step in steps:
        if step.line >= 0:
            template = settings.templates[int(table.template_of(step.line))]
            if template.num_copies:
                is_copy = table.rank[step.line, step.path] == table.max_rank
                yield template.num_copies, int(is_copy.sum())


@pytest.mark.parametrize("rows", [6, 16])
def test_tokens_equal_plain_vllm(case, rows):
    model, adapter = case
    requests = make_requests()
    plain = run(model, requests, **OPTIONS)
    bita = {"model": adapter, "num_speculative_tokens": rows - 1}
    with recorded_steps() as steps, engine(model, bita, **OPTIONS) as llm:
        outputs = generate(llm, requests)
        preempted = metric(llm, "num_preemptions")
        settings = llm.llm_engine.vllm_config.speculative_config.bita
    different = differences(lambda: engine(model), requests, plain, outputs)
    assert all(d.gap < NEAR_TIE for d in different)
    copied = list(copied_steps(settings, steps))
    accepted = [taken for _, taken in copied]
    assert sum(accepted) > len(accepted) / 4 > 5, "copies are hardly ever right"
    assert max(accepted) > 3, "no long copy was taken"
    assert preempted > 0
    assert len({rows for rows, _ in copied}) > 1, "the choice has no say"


def test_no_copies_where_the_user_wants_none(case):
    model, adapter = case
    bita = {"model": adapter, "num_speculative_tokens": 15, "copies": False}
    with recorded_steps() as steps, engine(model, bita) as llm:
        generate(llm, make_requests()[:3])
        settings = llm.llm_engine.vllm_config.speculative_config.bita
    assert any(step.line >= 0 for step in steps)
    assert not any((template.rank == COPY_RANK).any() for template in settings.templates)
    assert not list(copied_steps(settings, steps))

"""A source of drafts that is registered and nothing else: blocks are full of its tokens, answers stay plain vLLM's."""

from __future__ import annotations

import numpy as np
import pytest
from e2e.constant_source import FIRST_TOKEN, ConstantOnCPU, ConstantOnGPU
from e2e.engines import generate, make_adapter, metric, run
from e2e.inspection import recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

from bita_vllm.runner import sources
from bita_vllm.tree import Template, TemplateTable
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import TemplateSet

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
VOCAB_SIZE = 12  # so small that constant drafts are sometimes right
NUM_PROMPTS, MAX_TOKENS = (4, 20) if ON_GPU_RUNNER else (12, 40)
CONSTANT = sources.Source(
    *(f"{each.__module__}.{each.__qualname__}" for each in (ConstantOnCPU, ConstantOnGPU))
)
TEMPLATES = TemplateSet(
    (
        Template.build([(0, 0), (0, 1), (0, 2), (1, 0)], {0: 3, 1: 1}),
        # promises most where every candidate has the same chance: its four are all children of the root
        Template.build([(0, rank) for rank in range(4)], {0: 3, 1: 1}),
    )
)


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1, num_key_value_heads=1)
    folder = tmp_path_factory.mktemp("sources")
    adapter = make_adapter(model, folder / "adapter")
    Ladder.fixed(TEMPLATES).save(folder / "ladder.json")
    return model, {"model": str(adapter), "ladder": str(folder / "ladder.json"), "copies": False}


def test_a_registered_source_fills_the_blocks_and_changes_no_token(case, monkeypatch):
    model, bita = case
    rng = np.random.default_rng(3)
    asked = [
        (
            rng.integers(3, VOCAB_SIZE, rng.integers(1, 30)).tolist(),
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
        )
        for _ in range(NUM_PROMPTS)
    ]
    plain = run(model, asked)
    monkeypatch.setitem(sources.SOURCES, "masks", CONSTANT)
    with recorded_steps() as steps, engine(model, bita) as llm:
        before = metric(llm, "spec_decode_num_accepted_tokens")
        outputs = generate(llm, asked)
        accepted = metric(llm, "spec_decode_num_accepted_tokens") - before
    tokens, expected = (
        [list(output.outputs[0].token_ids) for output in each] for each in (outputs, plain)
    )
    assert tokens == expected

    table = TemplateTable(*TEMPLATES.templates)
    with_block = [step for step in steps if step.line >= 0]
    # The chances, the same for all, choose the second tree, of one depth; the masks' candidates are not looked at.
    assert {step.line for step in with_block} == {int(table.first_line[1]) + 1}
    for step in with_block:
        drafted = step.tokens[0] - FIRST_TOKEN
        assert step.path == ([0, 1 + drafted] if 0 <= drafted < 4 else [0]), step
    assert accepted > 0

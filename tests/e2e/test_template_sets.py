"""Blocks that choose their tree: tokens stay plain vLLM's, steps are those that the replay takes; on both runners."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from e2e.device_reads import device_reads
from e2e.engines import generate, make_adapter, run
from e2e.inspection import recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.training.evaluate import answer_predictions, chosen_lengths
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.samples import Sample
from bita_vllm.tree import Template, TemplateTable
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.template_set import TemplateSet

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
VOCAB_SIZE = 12  # so small that random drafts are often right
NUM_PROMPTS, MAX_TOKENS = (4, 20) if ON_GPU_RUNNER else (16, 40)
TEMPLATES = TemplateSet(
    (
        Template.build([(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)], {0: 3, 1: 3}),
        Template.build([(0, 0), (1, 0), (2, 0), (2, 1)], {0: 3, 1: 3}),  # deep
        Template.build([(0, rank) for rank in range(6)], {0: 3, 1: 1}),  # broad
        Template.build([(0, 0)], {0: 3, 1: 3}),  # lean
    )
)


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    small = {"num_hidden_layers": 1, "num_key_value_heads": 1} if ON_GPU_RUNNER else {}
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **{"num_hidden_layers": 2, **small})
    folder = tmp_path_factory.mktemp("sets")
    adapter = make_adapter(model, folder / "adapter")
    Ladder.fixed(TEMPLATES).save(folder / "ladder.json")
    return model, {"model": str(adapter), "ladder": str(folder / "ladder.json"), "copies": False}


def requests(**sampling):
    rng = np.random.default_rng(5)
    return [
        (
            rng.integers(3, VOCAB_SIZE, rng.integers(1, 30)).tolist(),
            SamplingParams(**sampling, max_tokens=MAX_TOKENS, ignore_eos=True),
        )
        for _ in range(NUM_PROMPTS)
    ]


def test_steps_are_those_of_the_replay(case):
    model, bita = case
    asked = requests(temperature=0)
    plain = run(model, asked)
    watched = device_reads() if ON_GPU_RUNNER else nullcontext([])
    with recorded_steps() as steps, engine(model, bita) as llm, watched as reads:
        outputs = generate(llm, asked)
    assert not reads, "the host waits for the device"
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [list(output.outputs[0].token_ids) for output in plain]

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = [Sample(prompt, answer) for (prompt, _), answer in zip(asked, tokens, strict=True)]
    predictions = answer_predictions(MaskModel.from_adapter(base, bita["model"]), samples, 10**6)
    config = AdapterConfig.load(bita["model"])
    acceptance = acceptance_table(config.acceptance, config.num_mask_tokens)
    expected = chosen_lengths(TEMPLATES, acceptance, predictions)
    by_request: dict[str, list] = {}
    for step in steps:
        by_request.setdefault(step.request.split("-")[0], []).append(step)
    for output, lengths in zip(outputs, expected, strict=True):
        _, *own = by_request[output.request_id]
        emitted = [len(step.tokens) for step in own]
        assert emitted[:-1] == lengths[:-1]
        assert emitted[-1] >= lengths[-1]  # max_tokens cuts the last

    table = TemplateTable(*TEMPLATES.templates)
    full = [step.line for step in steps if step.line >= 0]
    used = table.template_of(full)
    counts = np.bincount(used, minlength=len(TEMPLATES.templates))
    print(
        f"blocks by tree: {counts.tolist()}, accepted length {np.mean(np.concatenate(expected)):.3f}"
    )
    assert (counts > 0).sum() >= 3, "hardly a choice was made"


def test_seeded_sampling_is_plain_vllms(case):
    model, bita = case
    asked = requests(temperature=0.7, seed=3)
    plain = run(model, asked)
    with engine(model, bita) as llm:
        outputs = generate(llm, asked)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [
        list(o.outputs[0].token_ids) for o in plain
    ]

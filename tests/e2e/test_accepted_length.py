"""Each step of the engine emits what the naive decoder emits: no draft is lost, none is invented."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_templates import TEMPLATES, naive
from e2e.engines import generate, make_adapter
from e2e.inspection import StepRecord, recorded_steps
from naive_decoder import decode
from testbed.engines import engine, idle_threads, torch_threads
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.tree import Template, TemplateTable

VOCAB_SIZE = 12
ADAPTER = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct-no-deltas"


def engine_steps(
    model: Path, adapter: Path, tree: Path, prompts: list[list[int]], max_tokens: int, threads: int
) -> list[list[StepRecord]]:
    """Steps of every prompt, in the order of the prompts."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    bita = {"model": str(adapter), "tree": str(tree)}
    with recorded_steps() as steps, engine(model, bita, threads=threads) as llm:
        outputs = generate(llm, [(prompt, params) for prompt in prompts])
    by_request: dict[str, list[StepRecord]] = {}
    for step in steps:
        by_request.setdefault(step.request.split("-")[0], []).append(step)
    return [by_request[output.request_id] for output in outputs]


def check_steps(
    model: Path,
    adapter: Path,
    template: Template,
    prompts: list[list[int]],
    max_tokens: int,
    folder: Path,
    threads: int = 1,
) -> Counter:
    """Compare every step; returns how many steps had which accepted length."""
    template.save(folder / "tree.json")
    found = engine_steps(model, adapter, folder / "tree.json", prompts, max_tokens, threads)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights, num_rows = Adapter.load(adapter), TemplateTable(template).num_rows
    lengths: Counter = Counter()
    for prompt, (prefill, *steps) in zip(prompts, found, strict=True):
        with torch_threads(threads):
            expected = decode(reference, weights, naive(template), prompt, max_tokens)
        assert prefill.tokens == expected.tokens[:1]
        emitted = [step.tokens for step in steps]
        emitted[-1] = emitted[-1][: len(expected.steps[-1].tokens)]  # max_tokens cuts the last
        assert emitted == [step.tokens for step in expected.steps]
        assert [num_rows[step.line] for step in steps] == [len(s.rows) for s in expected.steps]
        lengths.update(len(tokens) for tokens in emitted)
    return lengths


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_every_step_emits_what_the_naive_decoder_emits(tiny_model, template, tmp_path):
    """20 prompts of 30 tokens; a vocabulary so small that random drafts are often right."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter", template.num_masks)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB_SIZE, rng.integers(1, 40)).tolist() for _ in range(20)]
    lengths = check_steps(model, adapter, template, prompts, 30, tmp_path)
    print(f"steps by accepted length: {dict(sorted(lengths.items()))}")
    assert max(lengths) >= min(template.max_depth + 1, 3), "no walk went far down the tree"


@pytest.mark.slow
def test_every_step_of_the_embedded_model_emits_what_the_naive_decoder_emits(
    embedded_model, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    questions = ["Write a haiku.", "Count from one to twenty in words."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    template = TEMPLATES["widths 5,4,3"]
    lengths = check_steps(
        embedded_model, ADAPTER, template, prompts, 16, tmp_path, threads=idle_threads()
    )
    print(f"steps by accepted length: {dict(sorted(lengths.items()))}")
    assert max(lengths) > 1

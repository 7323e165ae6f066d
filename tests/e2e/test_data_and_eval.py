"""`bita data` and `bita eval` with real engines: own answers, and simulated steps equal to the engine's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter
from testbed.engines import engine
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from bita_vllm import cli
from bita_vllm.training.configs import GenerateConfig
from bita_vllm.training.generate import Generator
from bita_vllm.training.own_prompts import PromptFilter
from bita_vllm.training.samples import Sample, SampleWriter, chat_prompt_ids, read_samples
from bita_vllm.tree import Template

VOCAB_SIZE = 12  # so small that random drafts are often right
HEADER = {"model": "m", "revision": None, "settings": {}}


def test_data_holds_the_models_own_prompts_and_greedy_answers(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        PromptFilter, "_fault", lambda self, text: ""
    )  # a random model writes noise
    model = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = GenerateConfig(max_prompt_tokens=120, max_answer_tokens=24, batch_size=64)
    path = tmp_path / "data.jsonl"
    with engine(model, max_num_seqs=64) as llm:
        generator = Generator(llm, tokenizer, config)
        generator.write_given(SampleWriter(path, HEADER), ["Hi there?", "Who are you?"], 2)
        generator.write_own(SampleWriter(path, HEADER), 6)
        samples = read_samples(path)
        greedy = SamplingParams(temperature=0, max_tokens=24)
        plain = generate(llm, [(sample.prompt_ids, greedy) for sample in samples])
    print(generator.filter, [sample.prompt for sample in samples])
    assert [sample.prompt for sample in samples[:2]] == ["Hi there?", "Who are you?"]
    assert len(samples) == 6
    for sample, output in zip(samples, plain, strict=True):
        assert sample.prompt_ids == chat_prompt_ids(tokenizer, sample.prompt)
        assert sample.answer_ids == list(output.outputs[0].token_ids)


@pytest.mark.slow
def test_simulated_steps_are_the_engines(tiny_model, tmp_path, capsys, monkeypatch):
    """Through the command, left-over candidates included; each answer takes the very same steps."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(12):
        prompt = rng.integers(3, VOCAB_SIZE, rng.integers(1, 30)).tolist()
        answer = base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        samples.append(Sample(prompt, answer[0, len(prompt) :].tolist()))
    samples = [sample for sample in samples if len(sample.answer_ids) > 5]
    SampleWriter(tmp_path / "data.jsonl", HEADER).append(samples)
    tree = tmp_path / "tree.json"
    Template.build(
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 2)],
        {0: 3, 1: 2, 2: 3, 3: 1, 4: 1, 6: 2},
    ).save(tree)
    options = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**28}
    argv = ["eval", adapter, "--data", tmp_path / "data.jsonl", "--tree", tree, "--engine"]
    argv += ["--dtype", "float32", "--engine-args", json.dumps(options), "--json"]
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["trees"]
    with capsys.disabled():
        print(row)
    assert row["same_answers"] == row["same_steps"] == len(samples) >= 6
    assert row["engine"] == pytest.approx(row["simulated"])
    assert row["simulated"] > 1.1, "too few drafts accepted for this test to say anything"

"""fp32, every kind of decoder: with bita the tokens are plain vLLM's, whatever the drafts are.

Tiny random models, 40 greedy requests each, a KV cache so small that requests are preempted,
chunked prefill. Drafts come from a random adapter, and from an oracle: known tokens somewhere in
the tree, so that walks end at every node and accepted rows move over block boundaries. Half of the
adapters have low-rank deltas as large as the weights: none of them may reach an ordinary row.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from e2e.engines import NEAR_TIE, differences, generate, make_adapter, metric, run
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

from bita_vllm.tree import Template

# On the V2 runner a step takes a third of a second: fewer requests, shorter ones.
NUM_REQUESTS = 6 if ON_GPU_RUNNER else 40
LONGEST = 8 if ON_GPU_RUNNER else 40  # times the shortest prompt
OPTIONS = {
    "max_model_len": 384,
    "max_num_seqs": 4 if ON_GPU_RUNNER else 8,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 14,
}
# Layers with and without a window have KV cache groups of their own.
MORE_BLOCKS = {"gemma2": {"num_gpu_blocks_override": 40}}

# Uneven on purpose: a node without a group, groups of one and two rows, ranks out of order.
UNEVEN = {
    "nodes": [[0, 0], [0, 2], [1, 1], [0, 1], [1, 0], [5, 0], [2, 0]],
    "groups": {"0": 3, "1": 1, "3": 2, "5": 3},
}

# architecture -> (options of bita, overrides of the model's config)
CASES = {
    "llama": {"tree": "5,4,3"},
    "qwen2": {"tree": "2,1"},
    "qwen3": {"tree": "auto", "num_speculative_tokens": 30},
    "mistral": {"tree": "uneven"},
    "phi3": {"tree": "auto", "num_speculative_tokens": 8},
    "gemma2": {"tree": "4,3,2"},
    "gpt2": {"tree": "uneven"},
    "opt": {"tree": "auto", "num_speculative_tokens": 2},
    "mixtral": {"tree": "3,3"},
}
DRAFTS = ["random adapter", "oracle"]
if ON_GPU_RUNNER:
    DRAFTS = ["oracle"]
    MORE_BLOCKS = {"gemma2": {"max_model_len": 256, "num_gpu_blocks_override": 20}}
WITH_DELTAS = {"llama", "qwen3", "phi3", "gpt2", "mixtral"}


def make_requests(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Short and long prompts, some with a prefix in common, some that repeat a few tokens."""
    rng = np.random.default_rng(7)
    shared = rng.integers(3, vocab_size, 35 if ON_GPU_RUNNER else 70).tolist()
    requests = []
    for i in range(NUM_REQUESTS):
        prompt = rng.integers(3, vocab_size, int(5 * LONGEST ** rng.random())).tolist()
        if i % 4 == 1:
            prompt = shared + prompt
        elif i % 4 == 2:
            prompt = prompt[:4] * (len(prompt) // 4)
        max_tokens = 8 + i if ON_GPU_RUNNER else int(60 ** rng.random())
        requests.append(
            (prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=i % 2 == 0))
        )
    return requests


@pytest.fixture(scope="module", params=CASES.items(), ids=CASES.keys())
def case(request, tiny_model, tmp_path_factory):
    """(model, options of bita, options of the engine, requests, plain vLLM's outputs)"""
    architecture, bita = request.param
    layers = {"num_hidden_layers": 2} if ON_GPU_RUNNER else {}
    model = tiny_model(architecture, **layers)
    folder = tmp_path_factory.mktemp("bita")
    if bita["tree"] == "uneven":
        (folder / "uneven.json").write_text(json.dumps(UNEVEN))
        bita = {**bita, "tree": str(folder / "uneven.json")}
    lora_rank = 8 if architecture in WITH_DELTAS else 0
    adapter = make_adapter(model, folder / "adapter", lora_rank=lora_rank)
    bita = {**bita, "model": str(adapter)}
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    requests = make_requests(vocab_size)
    plain = run(model, requests)
    return model, bita, {**OPTIONS, **MORE_BLOCKS.get(architecture, {})}, requests, plain


@pytest.mark.parametrize("drafts", DRAFTS)
def test_tokens_equal_plain_vllm(case, drafts):
    model, bita, options, requests, plain = case
    copies = (
        drafts != "oracle" and not ON_GPU_RUNNER
    )  # the oracle's walks are to end on every node of the tree
    with (
        recorded_steps() as steps,
        oracle(known(plain)) if drafts == "oracle" else nullcontext(),
        engine(model, {**bita, "copies": copies}, **options) as llm,
    ):
        counters = "num_preemptions", "spec_decode_num_accepted_tokens", "prefix_cache_hits"
        before = [metric(llm, name) for name in counters]
        outputs = generate(llm, requests)
        preempted, accepted, hits = (
            metric(llm, name) - count for name, count in zip(counters, before, strict=True)
        )
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        template: Template = llm.llm_engine.vllm_config.speculative_config.bita.template

    different = differences(lambda: engine(model), requests, plain, outputs)
    lengths = Counter(len(step.tokens) for step in steps if step.line >= 0)
    print(
        f"{template.describe()}; preempted {preempted}, prefix hits {hits}, accepted {accepted}, lengths {lengths}"
    )
    assert all(d.gap < NEAR_TIE for d in different)
    assert preempted > 0 or (ON_GPU_RUNNER and len(groups) == 1)
    assert hits > 0 or not ON_GPU_RUNNER, "no prefix came from the cache"
    if drafts == "oracle":
        assert max(lengths) == template.max_depth + 1
        assert accepted > 0
        ended = {step.path[-1] for step in steps if step.line == template.max_depth}
        assert ended == set(range(template.num_nodes)) or ON_GPU_RUNNER, "a node without an end"

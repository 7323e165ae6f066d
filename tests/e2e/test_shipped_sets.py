"""fp32: tokens are plain vLLM's in the shipped adapters' own trees, at every row budget they have; on both runners.

What decides about rows, bitmasks and buffers is the trees, so the model is tiny. An engine a budget serves requests
of every kind at once: without structure, where blocks choose their tree, then with it, where they do not. The KV
cache is so small that requests are preempted, and long prompts are prefilled in chunks next to blocks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.engines import generate, make_adapter, metric
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import engine
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.scheduling.scheduler import _BlockScheduler
from bita_vllm.tree import TemplateTable
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import saved_sets

pytestmark = pytest.mark.slow
ADAPTERS = Path(__file__).parents[2] / "adapters"
SHIPPED = {"deltas": "smollm2-135m-instruct", "no deltas": "smollm2-135m-instruct-no-deltas"}
SETS = {
    (name, rows): one
    for name, folder in SHIPPED.items()
    for rows, one in saved_sets(AdapterConfig.load(ADAPTERS / folder).acceptance).items()
}
VOCAB_SIZE = 512
BLOCK_SIZE = 32
LONGEST = 100  # prompt tokens: a long prefill's four chunks
OPTIONS = {
    "max_model_len": 192,
    "max_num_seqs": 5,
    "block_size": BLOCK_SIZE,
    "long_prefill_token_threshold": BLOCK_SIZE,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
FREE: dict[str, tuple[int, dict[str, Any]]] = {
    "free": (28, {}),
    "top-p, seeded": (30, {"temperature": 0.9, "top_p": 0.8, "seed": 3}),
    "penalties": (5, {"repetition_penalty": 1.3, "presence_penalty": 0.5}),
    "logprobs": (29, {"logprobs": 3}),
    "seeded": (31, {"temperature": 1.0, "seed": 5}),
    "long prompt": (LONGEST, {}),
}
STRUCTURED: dict[str, tuple[int, dict[str, Any]]] = {
    "long prompt again": (LONGEST, {}),
    "choices": (
        6,
        {
            "structured_outputs": StructuredOutputsParams(
                choice=["left hand side", "right hand side"]
            )
        },
    ),
    "regex": (8, {"structured_outputs": StructuredOutputsParams(regex="(ab|c){8}d")}),
    "JSON schema": (
        5,
        {
            "structured_outputs": StructuredOutputsParams(
                json={
                    "type": "object",
                    "properties": {
                        "where": {"enum": ["north", "south"]},
                        "is": {"type": "boolean"},
                    },
                    "required": ["where", "is"],
                    "additionalProperties": False,
                }
            )
        },
    ),
    "regex, seeded, penalties, logprobs": (
        11,
        {
            "structured_outputs": StructuredOutputsParams(regex="[a-f]{9}"),
            "temperature": 1.0,
            "seed": 9,
            "repetition_penalty": 1.2,
            "logprobs": 2,
        },
    ),
    "top-p beside structure": (12, {"temperature": 0.8, "top_p": 0.7, "seed": 4}),
}


def requests(kinds: dict[str, tuple[int, dict[str, Any]]]):
    return [
        (
            np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist(),
            SamplingParams(**{"temperature": 0, "max_tokens": 14, **params}),
        )
        for length, params in kinds.values()
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    # Trees see no layers and no heads; Triton's interpreter takes its time for each.
    return tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1, num_key_value_heads=1)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    ranks = {"deltas": 2, "no deltas": 0}
    return {
        name: make_adapter(model, tmp_path_factory.mktemp("adapter"), lora_rank=rank)
        for name, rank in ranks.items()
    }


@pytest.fixture(scope="module")
def plain(model):
    with engine(model, **OPTIONS) as llm:
        return generate(llm, requests(FREE)), generate(llm, requests(STRUCTURED))


@pytest.fixture
def mixed_steps(monkeypatch):
    """Counts steps in which a prefill's chunk meets blocks."""
    counts: Counter[bool] = Counter()
    update = _BlockScheduler.update_from_output

    def counting(self, step, output):
        rows, drafts = step.num_scheduled_tokens, step.scheduled_spec_decode_tokens
        counts[bool(drafts) and any(n > 1 and i not in drafts for i, n in rows.items())] += 1
        return update(self, step, output)

    monkeypatch.setattr(_BlockScheduler, "update_from_output", counting)
    return counts


@pytest.mark.parametrize(("name", "rows"), SETS)
def test_output_equals_plain_vllm(model, adapters, plain, mixed_steps, tmp_path, name, rows):
    trees = SETS[name, rows]
    Ladder.fixed(trees).save(tmp_path / "ladder.json")
    bita = {"model": str(adapters[name]), "ladder": str(tmp_path / "ladder.json")}
    options = {
        **OPTIONS,
        # a block of every request, and a chunk
        "max_num_batched_tokens": OPTIONS["max_num_seqs"] * rows + BLOCK_SIZE,
        # the longest request, one short one, and vLLM's null block
        "num_gpu_blocks_override": -(-(LONGEST + 14 + rows) // BLOCK_SIZE) + 3,
    }
    continuation = known([*plain[0], *plain[1]])
    with recorded_steps() as steps, oracle(continuation), engine(model, bita, **options) as llm:
        before = metric(llm, "num_preemptions")
        outputs = generate(llm, requests(FREE)), generate(llm, requests(STRUCTURED))
        preempted = metric(llm, "num_preemptions") - before

    for kinds, ours, theirs in zip((FREE, STRUCTURED), outputs, plain, strict=True):
        for kind, mine, expected in zip(kinds, ours, theirs, strict=True):
            check(kind, mine.outputs[0], expected.outputs[0])

    kind_of = {
        output.request_id: kind
        for kinds, ours in zip((FREE, STRUCTURED), outputs, strict=True)
        for kind, output in zip(kinds, ours, strict=True)
    }
    lines: dict[str, list[int]] = {kind: [] for kind in kind_of.values()}
    for step in steps:
        if step.line >= 0:
            lines[kind_of[step.request.split("-")[0]]].append(step.line)
    table = TemplateTable(*trees.templates)
    chosen = Counter(table.template_of([line for kind in FREE for line in lines[kind]]).tolist())
    lengths = [len(step.tokens) for step in steps if step.line > 0]
    cached = outputs[1][0].num_cached_tokens
    print(
        f"{len(lengths)} blocks with candidates, {sum(lengths)} tokens; trees {dict(chosen)}; "
        f"{preempted} preemptions, {mixed_steps[True]} mixed steps, {cached} cached tokens"
    )
    assert len(chosen) > 1, "no block chose its tree"
    with_grammar = [kind for kind, (_, p) in STRUCTURED.items() if "structured_outputs" in p]
    assert all(max(lines[kind]) > 0 for kind in with_grammar)
    assert max(max(lines[kind]) for kind in with_grammar) > trees.first.max_depth
    assert sum(lengths) > 1.2 * len(lengths)
    assert preempted > 0 and mixed_steps[True] > 0 and cached > 0


def check(kind: str, ours: Any, theirs: Any) -> None:
    assert list(ours.token_ids) == list(theirs.token_ids), kind
    assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason), kind
    assert (ours.logprobs is None) == (theirs.logprobs is None)
    for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
        assert {t: p.rank for t, p in a.items()} == {t: p.rank for t, p in b.items()}, kind
        # a forbidden token's is -inf
        assert [a[t].logprob for t in a] == pytest.approx([b[t].logprob for t in a], abs=1e-4), kind

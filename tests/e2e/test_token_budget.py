"""Blocks are optional work: they take from a step's token budget what root rows and prefill leave.

On both runners. The yardstick is a plain engine with the same budget, step by step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from e2e.engines import Requests, make_adapter, metric, run
from e2e.inspection import known, oracle
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

VOCAB_SIZE = 64
MODEL = {"num_hidden_layers": 1, "num_key_value_heads": 1} if ON_GPU_RUNNER else {}
MAX_TOKENS = 16 if ON_GPU_RUNNER else 48


def make_requests(lengths: list[int]) -> Requests:
    rng = np.random.default_rng(5)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return [(rng.integers(3, VOCAB_SIZE, length).tolist(), params.clone()) for length in lengths]


def serve(llm: Any, requests: Requests) -> tuple[list[list[int]], list[list[int]]]:
    """All at once; the tokens of each request, and the steps in which it got some."""
    for i, (prompt, params) in enumerate(requests):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params.clone())
    tokens: list[list[int]] = [[] for _ in requests]
    served: list[list[int]] = [[] for _ in requests]
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        step += 1
        for output in llm.llm_engine.step():
            request, ids = int(output.request_id), list(output.outputs[0].token_ids)
            if len(ids) > len(tokens[request]):
                served[request].append(step)
            tokens[request] = ids
    return tokens, served


def longest_gap(served: list[list[int]]) -> int:
    """Most steps between two in which a request got tokens."""
    return max(int(np.diff(steps).max()) for steps in served)


def first_steps(served: list[list[int]]) -> list[int]:
    return [steps[0] for steps in served]


@pytest.mark.parametrize(
    ("tree", "budget", "lengths"),
    [
        ("1", 8, [3] * 8),  # 4 rows
        ("3,2,1", 48, [5] * 8),  # 28 rows
        ("3,2,1", 100, [5] * 3 + [150, 40]),
    ],
    ids=["budget8", "budget48", "long-prompts"],
)
def test_every_request_is_served_as_often_as_in_plain_vllm(
    tiny_model, tmp_path, tree, budget, lengths
):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")
    requests = make_requests(lengths)
    options = {"max_num_batched_tokens": budget, "max_num_seqs": 8}
    with engine(model, **options) as llm:
        plain_tokens, plain = serve(llm, requests)
    outputs = run(model, requests)
    with (
        oracle(known(outputs)),
        engine(model, {"model": str(adapter), "tree": tree}, **options) as llm,
    ):
        tokens, served = serve(llm, requests)
    assert tokens == plain_tokens
    assert longest_gap(served) <= longest_gap(plain)
    # Prefill keeps the share of the budget that it has in plain vLLM.
    assert all(np.array(first_steps(served)) <= first_steps(plain))
    assert max(steps[-1] for steps in served) <= max(steps[-1] for steps in plain)


def test_blocks_come_back_where_they_fit(tiny_model, tmp_path):
    """Of four requests three end early; the last one drafts again, within the same budget."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")
    requests = make_requests([4] * 4)
    for _, params in requests[1:]:
        params.max_tokens = 4
    plain = run(model, requests)
    options = {"max_num_batched_tokens": 40, "max_num_seqs": 4}
    with (
        oracle(known(plain)),
        engine(model, {"model": str(adapter), "tree": "3,2,1"}, **options) as llm,
    ):
        before = metric(llm, "spec_decode_num_accepted_tokens")
        tokens, served = serve(llm, requests)
        accepted = metric(llm, "spec_decode_num_accepted_tokens") - before
    assert tokens == [list(output.outputs[0].token_ids) for output in plain]
    assert len(served[0]) < MAX_TOKENS  # several tokens a step
    assert accepted > 0


@pytest.mark.parametrize("level", ["summary", "detailed"])
def test_metrics_of_a_request_count_depths(tiny_model, tmp_path, level):
    """What `--per-request-spec-decode-metrics` tells a client is what `/metrics` counts: depths, never rows."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")
    requests = make_requests([4])
    plain = run(model, requests)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    with (
        oracle(known(plain)),
        engine(
            model,
            {"model": str(adapter), "tree": "3,2,1"},
            per_request_spec_decode_metrics=level,
        ) as llm,
    ):
        before = [metric(llm, f"spec_decode_{name}") for name in names]
        llm.llm_engine.add_request("0", {"prompt_token_ids": requests[0][0]}, requests[0][1])
        while llm.llm_engine.has_unfinished_requests():
            finished = [output for output in llm.llm_engine.step() if output.finished]
        drafts, drafted, accepted = (
            metric(llm, f"spec_decode_{name}") - start
            for name, start in zip(names, before, strict=True)
        )
    seen = finished[0].outputs[0].spec_decode_metrics.to_dict()
    assert seen["num_spec_tokens"] == 3
    assert len(seen["acceptance_histogram"]) == 4
    assert (
        seen["num_spec_steps"],
        seen["num_draft_tokens"],
        seen["num_accepted_draft_tokens"],
    ) == (
        drafts,
        drafted,
        accepted,
    )
    assert drafted <= 3 * drafts
    if level == "detailed":
        assert sum(seen["per_step_drafted"]) == drafted
        assert max(seen["per_step_drafted"]) <= 3

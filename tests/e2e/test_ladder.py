"""Rows by load: the number of requests goes up and down through every width, and the tokens stay plain vLLM's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from e2e.engines import (
    ON_GPU_RUNNER,
    Requests,
    differences,
    engine,
    generate,
    make_adapter,
    metric,
    run,
)
from e2e.inspection import known, oracle, recorded_steps
from vllm import SamplingParams

from bita_vllm.ladder import LADDER_FILE, Ladder
from bita_vllm.scheduler import depth_of_line
from bita_vllm.tree import Template, TemplateTable

VOCAB_SIZE = 64
TEMPLATES = [
    Template.from_widths([1], 1),  # 4 rows
    Template.build([(0, 0), (1, 0), (0, 1), (2, 0)], {0: 3, 1: 2, 2: 1}),  # 11 rows
    Template.from_widths([3, 2, 1], 3),  # 28 rows
]
WIDTHS = [template.num_rows - 1 for template in TEMPLATES]
LADDER = Ladder(
    dict(zip(WIDTHS, TEMPLATES, strict=True)),
    [(1, 2, WIDTHS[2]), (3, 5, WIDTHS[1]), (6, 8, 0), (9, 10, WIDTHS[0]), (11, 11, 0)],
)

pytestmark = pytest.mark.skipif(ON_GPU_RUNNER, reason="test_gpu_runner.py has its own")


def make_requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of one token, of a few, and of more than a step's budget; greedy and seeded."""
    rng = np.random.default_rng(3)
    lengths = [1, 5, 300, 33, 1, 12, 64, 2, 90, 1, 40, 7, 200]
    requests = []
    for i, length in enumerate(lengths):
        sampled: dict[str, Any] = {"temperature": 1.0, "seed": 17 + i} if i % 4 == 3 else {}
        params = SamplingParams(
            **{"temperature": 0, **sampled}, max_tokens=70 + 3 * i, ignore_eos=True
        )
        requests.append((rng.integers(3, VOCAB_SIZE, length).tolist(), params))
    return requests


def ramp(llm: Any, requests: Requests, steps_between: int) -> dict[int, Any]:
    """One more request every few steps, until all are in; outputs by request."""
    finished: dict[int, Any] = {}
    waiting, step = list(enumerate(requests)), 0
    while len(finished) < len(requests):
        if waiting and step % steps_between == 0:
            i, (prompt, params) = waiting.pop(0)
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params.clone())
        step += 1
        finished |= {int(o.request_id): o for o in llm.llm_engine.step() if o.finished}
    return finished


def test_a_ramp_through_all_widths_returns_plain_vllms_tokens(tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    adapter = make_adapter(model, tmp_path / "adapter")
    LADDER.save(adapter / LADDER_FILE)
    requests = make_requests()
    plain = run(model, requests)
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 12}
    with (
        oracle(known(plain)),
        recorded_steps() as steps,
        engine(model, {"model": str(adapter)}, **options) as llm,
    ):
        assert llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens == WIDTHS[2]
        outputs = ramp(llm, requests, steps_between=3)

    greedy = [i for i, (_, params) in enumerate(requests) if params.temperature == 0]
    different = differences(
        lambda: engine(model),
        [requests[i] for i in greedy],
        [plain[i] for i in greedy],
        [outputs[i] for i in greedy],
    )
    assert not different
    for i, output in outputs.items():  # seeded ones too
        assert list(output.outputs[0].token_ids) == list(plain[i].outputs[0].token_ids)

    table = TemplateTable(*TEMPLATES)
    template_of_line = np.repeat(np.arange(len(TEMPLATES)), table.max_depths + 1)
    order = [int(template_of_line[step.line]) if step.line >= 0 else -1 for step in steps]
    assert set(order) == {-1, 0, 1, 2}
    crossed = {(a, b) for a, b in pairwise(order) if a != b}
    assert {(2, 1), (1, 2)} <= crossed, "few requests use more rows"
    assert {b for a, b in crossed if a == -1} == {0, 1, 2}, (
        "from plain steps back to every template"
    )
    longest = {
        t: max(len(s.tokens) for s, u in zip(steps, order, strict=True) if u == t) for t in range(3)
    }
    assert longest == {0: 2, 1: 4, 2: 4}, "walks go to the end of every tree"


def test_widths_follow_what_is_accepted(tiny_model, tmp_path, monkeypatch):
    """A ladder that promises much beside drafts that are never right: plain decoding soon, the tokens the same."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    adapter = make_adapter(model, tmp_path / "adapter")
    free_rows = {"step_seconds": [[n, rows, 0.01] for n in (1, 8) for rows in (1, 28)]}
    widths = dict(zip(WIDTHS, TEMPLATES, strict=True))
    Ladder(widths, [(1, 8, WIDTHS[2]), (9, 9, 0)], free_rows).save(adapter / LADDER_FILE)
    monkeypatch.setattr("bita_vllm.tuning.online.REVIEW_SECONDS", 0.5)
    requests = [
        (prompt, SamplingParams(temperature=0, max_tokens=250, ignore_eos=True))
        for prompt, _ in make_requests()[:4]
    ]
    plain = run(model, requests)
    with recorded_steps() as steps, engine(model, {"model": str(adapter)}) as llm:
        outputs = [o.outputs[0].token_ids for o in generate(llm, requests)]
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.dynamic_sd_lookup[4] == 0
    assert outputs == [o.outputs[0].token_ids for o in plain]
    has_block = np.array([step.line >= 0 for step in steps])
    assert has_block[: len(steps) // 20].any()
    assert not has_block[-len(steps) // 4 :].any()


def test_requests_whose_drafts_are_wrong_go_without(tiny_model, tmp_path, monkeypatch):
    """An oracle that knows what every second request says: these keep their blocks, the others get few."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    adapter = make_adapter(model, tmp_path / "adapter")
    widths = dict(zip(WIDTHS, TEMPLATES, strict=True))
    # A block of ten rows more costs a fifth of a token.
    costs = {
        "step_seconds": [[n, rows, 0.01 + 0.0002 * (rows - 1)] for n in (1, 8) for rows in (1, 11)]
    }
    Ladder(widths, [(1, 8, WIDTHS[1]), (9, 9, 0)], costs).save(adapter / LADDER_FILE)
    monkeypatch.setattr("bita_vllm.tuning.online.REVIEW_SECONDS", 1e9)
    requests = [
        (prompt, SamplingParams(temperature=i // 2 % 2, seed=i, max_tokens=200, ignore_eos=True))
        for i, (prompt, _) in enumerate(make_requests()[:6])
    ]
    plain = run(model, requests)
    with (
        oracle(known(plain[::2])),
        recorded_steps() as steps,
        engine(model, {"model": str(adapter)}) as llm,
    ):
        before = metric(llm, "spec_decode_num_draft_tokens")
        outputs = generate(llm, requests)
        drafted = metric(llm, "spec_decode_num_draft_tokens") - before
    for theirs, ours in zip(plain, outputs, strict=True):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids)

    by_request = [[s for s in steps if s.request.split("-")[0] == o.request_id] for o in outputs]
    for i, own in enumerate(by_request):
        has_block = np.array([step.line >= 0 for step in own])
        print(i, len(own), int(has_block.sum()), np.flatnonzero(np.diff(has_block)).tolist())
        if i % 2 == 0:
            assert has_block[1:].all(), "all but the prefill"
            assert len(own) < 120
        else:
            assert has_block[1:8].all() and has_block.mean() < 0.4
            assert has_block[50:].any(), "another trial"
    offered = depth_of_line(TemplateTable(*TEMPLATES))
    assert drafted == sum(int(offered[step.line, -1]) for step in steps if step.line >= 0)

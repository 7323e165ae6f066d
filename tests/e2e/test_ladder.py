"""Rows by load: the number of requests goes up and down through every width, and the tokens stay plain vLLM's.

On both runners; on V2 (`--runner gpu`), where a step takes a good tenth of a second, with fewer requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from e2e.engines import Requests, differences, generate, make_adapter, metric, run
from e2e.inspection import StepRecord, known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from tree_tools import sets_of_one
from vllm import SamplingParams

from bita_vllm.scheduling.scheduler import BitaScheduler, depth_of_line
from bita_vllm.tree import Template, TemplateTable
from bita_vllm.tree.ladder import LADDER_FILE, Ladder

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
VOCAB_SIZE = 64
TEMPLATES = [
    Template.from_widths([1], 1),  # 4 rows
    Template.build([(0, 0), (1, 0), (0, 1), (2, 0)], {0: 3, 1: 2, 2: 1}),  # 11 rows
    Template.from_widths([3, 2, 1], 3),  # 28 rows
]
WIDTHS = [template.width for template in TEMPLATES]
TABLE = TemplateTable(*TEMPLATES)
# Requests of the ramp: tokens of each prompt (one, a few, more than a step's budget); ranges of batch sizes.
if ON_GPU_RUNNER:
    MODEL = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    LENGTHS, MAX_TOKENS = (1, 70, 5, 33, 1, 12), range(10, 46, 6)
    RANGES = [(1, 1, WIDTHS[2]), (2, 2, WIDTHS[1]), (3, 3, 0), (4, 4, WIDTHS[0]), (5, 5, 0)]
    OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "long_prefill_token_threshold": 8}
else:
    MODEL = {}
    LENGTHS, MAX_TOKENS = (1, 5, 300, 33, 1, 12, 64, 2, 90, 1, 40, 7, 200), range(70, 109, 3)
    RANGES = [(1, 2, WIDTHS[2]), (3, 5, WIDTHS[1]), (6, 8, 0), (9, 10, WIDTHS[0]), (11, 11, 0)]
    OPTIONS = {
        "max_num_batched_tokens": 256,
        "max_num_seqs": 12,
        "long_prefill_token_threshold": 100,  # leaves room for blocks next to a long prompt
    }


def make_ladder(ranges: Sequence[tuple[int, int, int]], **provenance: Any) -> Ladder:
    return Ladder(sets_of_one(TEMPLATES), ranges, provenance)


def make_requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy and seeded."""
    rng = np.random.default_rng(3)
    requests = []
    for i, (length, max_tokens) in enumerate(zip(LENGTHS, MAX_TOKENS, strict=True)):
        sampled: dict[str, Any] = {"temperature": 1.0, "seed": 17 + i} if i % 4 == 3 else {}
        params = SamplingParams(
            **{"temperature": 0, **sampled}, max_tokens=max_tokens, ignore_eos=True
        )
        requests.append((rng.integers(3, VOCAB_SIZE, length).tolist(), params))
    return requests


def templates_of(steps: Sequence[StepRecord]) -> list[int]:
    """Place in TEMPLATES of the template that each block was made from, -1 without a block."""
    of_line = np.repeat(np.arange(len(TEMPLATES)), TABLE.mask_depths + 1)
    return [int(of_line[step.line]) if step.line >= 0 else -1 for step in steps]


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
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")
    make_ladder(RANGES).save(adapter / LADDER_FILE)
    requests = make_requests()
    plain = run(model, requests)
    with (
        oracle(known(plain)),
        recorded_steps() as steps,
        engine(model, {"model": str(adapter), "copies": False}, **OPTIONS) as llm,
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

    order = templates_of(steps)
    assert set(order) == {-1, 0, 1, 2}
    crossed = {(a, b) for a, b in pairwise(order) if a != b}
    assert {(2, 1), (1, 2)} <= crossed, "few requests use more rows"
    assert {b for a, b in crossed if a == -1} == {0, 1, 2}, (
        "from plain steps back to every template"
    )
    whole = TABLE.first_line + TABLE.mask_depths  # lines of blocks with candidates at every depth
    lengths = [{len(step.tokens) for step in steps if step.line == line} for line in whole]
    print(f"{len(steps)} blocks and plain tokens, lengths by template {lengths}")
    assert lengths == [{1, 2}, {1, 2, 3, 4}, {1, 2, 3, 4}], "walks end at every depth of every tree"


@pytest.mark.parametrize(
    ("drafts", "row_seconds", "first", "last"),
    [("random adapter", 5e-5, 2, -1), ("oracle", 2e-5, 0, 2)],
)
def test_widths_follow_what_is_accepted(
    tiny_model, tmp_path, monkeypatch, drafts, row_seconds, first, last
):
    """Drafts that are hardly ever right: plain decoding soon; that often are: more rows. The tokens stay the same.

    Rows cost so much that it depends on what is accepted whether they pay. Steps take what the ladder says, on any
    machine, so that the widths do not follow its load.
    """
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")

    def seconds(rows: int) -> float:
        return 0.01 + row_seconds * rows

    points = [[n, rows, seconds(n * rows)] for n in (1, 8) for rows in (1, 28)]
    ranges = [(1, 4, WIDTHS[first]), (5, 8, WIDTHS[2]), (9, 9, 0)]
    make_ladder(ranges, step_seconds=points).save(adapter / LADDER_FILE)

    follow, clock = BitaScheduler._follow_the_load, SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now

    def following(self: BitaScheduler, step: Any, *args: Any) -> None:
        clock.now += seconds(step.total_num_scheduled_tokens)
        follow(self, step, *args)

    monkeypatch.setattr(BitaScheduler, "_follow_the_load", following)
    monkeypatch.setattr("bita_vllm.scheduling.scheduler.time", clock)
    monkeypatch.setattr("bita_vllm.scheduling.online.time", clock)
    monkeypatch.setattr("bita_vllm.scheduling.online.REVIEW_SECONDS", 0.1)  # about ten steps
    requests = [
        (prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for prompt, _ in make_requests()[:4]
    ]
    plain = run(model, requests)
    source = oracle(known(plain)) if drafts == "oracle" else nullcontext()
    with (
        recorded_steps() as steps,
        source,
        engine(model, {"model": str(adapter), "copies": False}) as llm,
    ):
        outputs = [o.outputs[0].token_ids for o in generate(llm, requests)]
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.dynamic_sd_lookup[4] == (0 if last == -1 else WIDTHS[last])
    assert outputs == [o.outputs[0].token_ids for o in plain]
    order = templates_of(steps)
    print(order)
    assert 1 not in order, "a width that the ladder does not name"
    assert next(template for template in order if template >= 0) == first
    end = order[-len(order) // 3 :]
    assert end.count(last) > 0.9 * len(end)


@pytest.mark.skipif(ON_GPU_RUNNER, reason="there every request of a step has as many rows")
def test_requests_whose_drafts_are_wrong_go_without(tiny_model, tmp_path, monkeypatch):
    """An oracle that knows what every second request says: these keep their blocks, the others get few."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    adapter = make_adapter(model, tmp_path / "adapter")
    # A block of ten rows more costs a fifth of a token.
    costs = {
        "step_seconds": [[n, rows, 0.01 + 0.0002 * (rows - 1)] for n in (1, 8) for rows in (1, 11)]
    }
    Ladder(sets_of_one(TEMPLATES), [(1, 8, WIDTHS[1]), (9, 9, 0)], costs).save(
        adapter / LADDER_FILE
    )
    monkeypatch.setattr("bita_vllm.scheduling.online.REVIEW_SECONDS", 1e9)
    requests = [
        (prompt, SamplingParams(temperature=i // 2 % 2, seed=i, max_tokens=200, ignore_eos=True))
        for i, (prompt, _) in enumerate(make_requests()[:6])
    ]
    plain = run(model, requests)
    with (
        oracle(known(plain[::2])),
        recorded_steps() as steps,
        engine(model, {"model": str(adapter), "copies": False}) as llm,
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

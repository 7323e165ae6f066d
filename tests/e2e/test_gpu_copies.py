"""Copies on the V2 runner, beside masks: tokens as plain V2's, whatever is asked for; copies are drafted and accepted.

Runs with `pytest --runner gpu`.
"""

from __future__ import annotations

import numpy as np
import pytest
from e2e.device_reads import device_reads
from e2e.engines import generate, make_adapter, metric, run
from e2e.inspection import recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from bita_vllm.step.settings import get_settings
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import TemplateSet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
# Fewer requests at once than there are, and too few KV blocks for those: slots go from one to the next.
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 6,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
WORDS = [300, 301, 302]  # so few that texts repeat
FEW = {"allowed_token_ids": WORDS}
ASKED = {
    "greedy": {"temperature": 0, "max_tokens": 40, **FEW},
    "seeded": {"temperature": 0.7, "seed": 3, **FEW},
    "logprobs": {"temperature": 0.3, "seed": 5, "logprobs": 2, **FEW},
    "penalty": {"temperature": 0, "repetition_penalty": 1.1, "max_tokens": 8, **FEW},
    "regex": {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="(abc){6}d")},
    "greedy after others": {"temperature": 0, "max_tokens": 40, **FEW},
}


def make_requests():
    rng = np.random.default_rng(0)
    requests = []
    for asked in ASKED.values():
        words = rng.choice(WORDS, 8).tolist()
        sampling = SamplingParams(**{"max_tokens": 32, "ignore_eos": True, **asked})
        requests.append(([*words, *words, *words, *words[:3]], sampling))
    return requests


def check_sleep_keeps_its_tensors(runner) -> None:
    """What a step expects of the one before."""
    kept = {buffer.data_ptr() for buffer in runner.model.buffers()}
    source = runner.speculator.source
    for tensor in (
        source._state.last,
        source._state.evidence,
        source._masks.ranking.arrived,
        source.candidates.depths,
    ):
        assert tensor.data_ptr() in kept


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    small = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    model = tiny_model("llama", vocab_size=512, **small)
    return model, make_adapter(model, tmp_path_factory.mktemp("copies") / "adapter")


def test_tokens_are_plain_vllms_and_copies_are_accepted(case):
    model, adapter = case
    requests = make_requests()
    plain = run(model, requests, **OPTIONS)
    bita = {"model": str(adapter), "num_speculative_tokens": 11, "copies": True}
    with recorded_steps() as steps, engine(model, bita, **OPTIONS) as llm:
        table = get_settings(llm.llm_engine.vllm_config).ladder.table
        with device_reads() as reads:
            outputs = generate(llm, requests)
        preempted = metric(llm, "num_preemptions")
        check_sleep_keeps_its_tensors(
            llm.llm_engine.model_executor.driver_worker.worker.model_runner
        )
    assert not reads and preempted > 0
    for name, ours, theirs in zip(ASKED, outputs, plain, strict=True):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids), name
    ours, theirs = (
        each[list(ASKED).index("logprobs")].outputs[0].logprobs for each in (outputs, plain)
    )
    assert [at.keys() for at in ours] == [at.keys() for at in theirs]

    accepted = dict.fromkeys(ASKED, 0)
    names = dict(zip((output.request_id for output in outputs), ASKED, strict=True))
    for step in steps:
        name = names.get(step.request.split("-")[0])
        if name and step.line >= 0:
            accepted[name] += int((table.rank[step.line, step.path] == table.max_rank).sum())
    print(accepted)
    without_masks = {
        step.line for step in steps if step.line in table.first_line and len(step.path) > 1
    }
    assert without_masks, "the first block of a request holds copies alone"
    for name in ("greedy", "regex", "greedy after others"):
        assert accepted[name] > 0, name


def test_samplers_and_logprobs_go_no_deeper_than_a_steps_own_trees(case, tmp_path, monkeypatch):
    """A set of long chains for one request, one of 4 rows for more: rows in proportion to a step's own nodes."""
    from bita_vllm.runner import gpu_sampling

    model, adapter = case
    sets = [
        TemplateSet((Template.from_widths([width], length),)) for width, length in ((1, 1), (3, 3))
    ]
    ladder = Ladder(sets, [(1, 1, sets[1].first.width), (2, 4, sets[0].first.width)])
    ladder.save(tmp_path / "ladder.json")
    bita = {"model": str(adapter), "ladder": str(tmp_path / "ladder.json"), "copies": True}
    lengths, rows = set(), set()
    extend, score = gpu_sampling.extend_paths, gpu_sampling.compute_topk_scores

    def extending(sampled, length, line, num_rows, node_tokens, *args):
        lengths.add((len(node_tokens) // len(line), length))
        return extend(sampled, length, line, num_rows, node_tokens, *args)

    def scoring(logits, num_logprobs, tokens, starts, **kwargs):
        rows.add(starts[1])
        return score(logits, num_logprobs, tokens, starts, **kwargs)

    monkeypatch.setattr(gpu_sampling, "extend_paths", extending)
    monkeypatch.setattr(gpu_sampling, "compute_topk_scores", scoring)
    few = [make_requests()[list(ASKED).index(name)] for name in ("logprobs", "penalty")]
    plain = run(model, few, **OPTIONS)
    lengths.clear(), rows.clear()
    outputs = run(model, few, bita, **OPTIONS)
    for ours, theirs in zip(outputs, plain, strict=True):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids)
    for ours, theirs in zip(
        *(each[0].outputs[0].logprobs for each in (outputs, plain)), strict=True
    ):
        assert ours.keys() == theirs.keys()
    assert {(4, 4)} <= lengths and all(length <= nodes for nodes, length in lengths)
    assert len(rows) == 2 and 4 in rows, rows

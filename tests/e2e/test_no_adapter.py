"""fp32, CPU: without an adapter drafts are copies of text already seen, and the tokens are plain vLLM's."""

from __future__ import annotations

import numpy as np
import pytest
from e2e.engines import NEAR_TIE, differences, generate, metric, run
from e2e.inspection import recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.skipif(ON_GPU_RUNNER, reason="config.py refuses it there")
VOCAB_SIZE = 16  # so small that texts repeat
OPTIONS = {
    "max_model_len": 384,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 40,
}
# gemma2: windows, soft caps, and embeddings that are scaled and tied
ARCHITECTURES = ("llama", "gemma2")


ALONE = (5, 11, 17, 2, 8)  # prompts that repeat; the first three are greedy


def make_requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy and seeded, short and long prompts, some that repeat a few tokens."""
    rng = np.random.default_rng(5)
    requests = []
    for i in range(24):
        prompt = rng.integers(3, VOCAB_SIZE, int(4 * 30 ** rng.random())).tolist()
        prompt = prompt[:5] * (len(prompt) // 5 + 1) if i % 3 == 2 else prompt
        sampling = {"temperature": 0} if i % 2 else {"temperature": 0.7, "seed": i}
        requests.append((prompt, SamplingParams(max_tokens=40, ignore_eos=True, **sampling)))
    return requests


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tiny_model):
    model = tiny_model(request.param, vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    requests = make_requests()
    return model, requests, run(model, requests)


@pytest.mark.parametrize("bita", [{}, {"num_speculative_tokens": 5}], ids=["by load", "5 copies"])
def test_tokens_equal_plain_vllm(case, bita):
    model, requests, plain = case
    counters = [f"spec_decode_num_{what}_tokens" for what in ("draft", "accepted")]
    with recorded_steps() as steps, engine(model, bita, **OPTIONS) as llm:
        before = [metric(llm, name) for name in counters]
        alone = [generate(llm, [requests[i]])[0] for i in ALONE]  # one request, so long blocks
        together = generate(llm, requests)
        drafted, accepted = (
            metric(llm, name) - count for name, count in zip(counters, before, strict=True)
        )
        llm.collective_rpc("reload_weights")
        again = generate(llm, [requests[i] for i in ALONE])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert runner._block_model is runner._plain_model, "no second form is needed"
    asked = [*(requests[i] for i in ALONE), *requests]
    expected = [*(plain[i] for i in ALONE), *plain]
    different = differences(lambda: engine(model), asked, expected, alone + together)
    greedy = [params.temperature == 0 for _, params in asked]
    assert all(greedy[d.request] and d.gap < NEAR_TIE for d in different)
    print(f"{drafted} tokens drafted, {accepted} accepted")
    assert 0 < accepted < drafted
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in alone]
    longest = max(len(step.path) - 1 for step in steps)
    assert longest > 1, "no block with two right copies"
    assert any(step.line < 0 for step in steps), "every request had a match in every step"


def test_structured_output_is_copied_where_the_grammar_repeats(tiny_model):
    model = tiny_model("llama", vocab_size=512, num_hidden_layers=2)
    options = {
        "max_model_len": 128,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    requests = [
        (
            [259 + i, 270, 281],
            SamplingParams(
                max_tokens=40,
                structured_outputs=StructuredOutputsParams(regex=regex),
                **sampling,
            ),
        )
        for i, regex in enumerate(["(ab){8}c", "(a|b)(cd){7}e", "[ab]{20}"])
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": i})
    ]
    plain = run(model, requests, **options)
    with engine(model, {"num_speculative_tokens": 4}, **options) as llm:
        before = metric(llm, "spec_decode_num_accepted_tokens")
        outputs = generate(llm, requests)
        accepted = metric(llm, "spec_decode_num_accepted_tokens") - before
    for ours, theirs in zip(outputs, plain, strict=True):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids)
        assert ours.outputs[0].finish_reason == theirs.outputs[0].finish_reason
    assert accepted > 20, accepted

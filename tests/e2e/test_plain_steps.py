"""Steps without blocks in an engine with bita call what plain vLLM calls: nothing more, nothing else."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from e2e.engines import generate, make_adapter
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

pytestmark = pytest.mark.skipif(ON_GPU_RUNNER, reason="of vLLM's CPU runner")
NO_DRAFTS = Path(__file__).parents[2] / "benchmarks" / "data" / "no_drafts_ladder.json"
NUM_STEPS = 4


def calls_of_plain_steps(llm, prompts, params):
    """How often each operation is called in decode steps of all requests, and in their prefill."""
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params.clone())
    found = []
    for steps in (1, NUM_STEPS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(steps):
                llm.llm_engine.step()
        found.append(Counter({event.key: event.count for event in profile.key_averages()}))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return found


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_calls_are_those_of_plain_vllm(tiny_model, tmp_path, eager):
    model = tiny_model("llama", dtype="bfloat16", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=8)
    options = {"dtype": "bfloat16", "enforce_eager": eager, "max_model_len": 256, "max_num_seqs": 4}
    prompts = [list(range(3, 20)), list(range(30, 60))]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    calls = []
    for bita in (None, {"model": str(adapter), "ladder": str(NO_DRAFTS)}):
        with engine(model, bita, **options) as llm:
            generate(llm, [(prompts[0], params)])
            calls.append(calls_of_plain_steps(llm, prompts, params))
    (plain_prefill, plain_decode), (prefill, decode) = calls
    assert plain_decode.total() > 50
    assert decode == plain_decode
    assert prefill == plain_prefill

"""V2 runner: requests that go away in any phase, a full KV cache, an error in a step.

Runs with `pytest --runner gpu`. What is left of a batch says what plain V2 says, and all KV blocks come back.
"""

from __future__ import annotations

import numpy as np
import pytest
from e2e.engines import make_adapter, metric, run
from e2e.inspection import known, oracle
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "num_gpu_blocks_override": 7,
    "enable_prefix_caching": False,
}
# engine steps before the abort, prompt tokens: two chunks of 32 and a rest; short prompts are ready after one
PHASES = {
    "waiting": (0, 5),
    "prefill chunk": (1, 80),
    "first decode": (1, 5),
    "block in flight": (3, 5),
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


COMPANY = prompt(100, 9)
# Two at a time need more blocks than there are.
LARGE = [
    (prompt(200 + i, 70), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for i in range(3)
]


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    model = tiny_model("llama", num_hidden_layers=1)
    adapter = make_adapter(model, tmp_path_factory.mktemp("adapter"))
    plain = run(model, [(COMPANY, GREEDY), *LARGE], **OPTIONS)
    return model, {"model": str(adapter), "tree": "2,1"}, plain


def test_batch_survives_aborts_and_a_full_cache(case):
    model, bita, plain = case
    expected = [list(output.outputs[0].token_ids) for output in plain]
    with oracle(known(plain)), engine(model, bita, **OPTIONS) as llm:
        core = llm.llm_engine
        pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        for seed, (phase, (steps, length)) in enumerate(PHASES.items()):
            core.add_request("company", {"prompt_token_ids": COMPANY}, GREEDY.clone())
            core.add_request("leaves", {"prompt_token_ids": prompt(seed, length)}, GREEDY.clone())
            finished = []
            for step in range(40):
                if step == steps:
                    core.abort_request(["leaves"])
                finished += [output for output in core.step() if output.finished]
                if not core.has_unfinished_requests():
                    break
            tokens = {o.request_id: list(o.outputs[0].token_ids) for o in finished}
            assert tokens.keys() == {"company"}, phase
            assert tokens["company"] == expected[0], phase
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, (
                phase
            )  # one is vLLM's null block

        before = metric(llm, "num_preemptions")
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens, _ in LARGE],
            [params.clone() for _, params in LARGE],
            use_tqdm=False,
        )
        assert metric(llm, "num_preemptions") > before
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected[1:]
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_an_error_in_the_walk_ends_the_engine_and_sends_no_wrong_token(case, monkeypatch):
    from bita_vllm.step.device import StepTrees

    model, bita, plain = case
    walk, calls = StepTrees.walk, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the walk failed")
        return walk(self, *args)

    monkeypatch.setattr(StepTrees, "walk", failing)
    sent: list[int] = []
    with engine(model, bita, **OPTIONS) as llm:
        core = llm.llm_engine
        core.add_request("a", {"prompt_token_ids": COMPANY}, GREEDY.clone())
        with pytest.raises(RuntimeError, match="the walk failed"):
            for _ in range(40):
                for output in core.step():
                    sent = list(output.outputs[0].token_ids)
    expected = list(plain[0].outputs[0].token_ids)
    assert 0 < len(sent) < len(expected)
    assert sent == expected[: len(sent)]

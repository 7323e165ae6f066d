"""Blocks that are left out while vLLM schedules ahead: the drafts of the step before are placeholders."""

from __future__ import annotations

import pytest
from e2e.engines import make_adapter, run
from e2e.inspection import known, oracle
from e2e.test_token_budget import MODEL, VOCAB_SIZE, make_requests
from testbed.engines import ON_GPU_RUNNER, engine

from bita_vllm import config
from bita_vllm.scheduling import scheduler

pytestmark = pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu")


@pytest.fixture
def scheduled_ahead(monkeypatch):
    """vLLM's CPU platform turns it off."""
    check = config.check_engine

    def asynchronous(vllm_config, settings):
        vllm_config.scheduler_config.async_scheduling = True
        check(vllm_config, settings)

    monkeypatch.setattr(config, "check_engine", asynchronous)


def test_blocks_left_out_change_no_token(tiny_model, tmp_path, monkeypatch, scheduled_ahead):
    """Four requests decode with blocks of 8 rows; then a prompt comes that takes all of the budget, and its rest."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    adapter = make_adapter(model, tmp_path / "adapter")
    requests = make_requests([3, 4, 5, 6, 52])
    outputs = run(model, requests)
    kept, leave_out = [], scheduler.leave_out_blocks

    def counted(running, *sizes):
        before = sum(bool(request.spec_token_ids) for request in running)
        leave_out(running, *sizes)
        kept.append((before, sum(bool(request.spec_token_ids) for request in running)))

    monkeypatch.setattr(scheduler, "leave_out_blocks", counted)
    bita = {"model": str(adapter), "tree": "1"}
    tokens = {}
    with (
        oracle(known(outputs)),
        engine(model, bita, max_num_batched_tokens=40, max_num_seqs=5) as llm,
    ):
        core = llm.llm_engine
        assert core.engine_core.engine_core.batch_queue is not None
        for step in range(60):
            for i, (prompt, params) in enumerate(requests):
                if step == (6 if i == 4 else 0):
                    core.add_request(str(i), {"prompt_token_ids": prompt}, params.clone())
            for output in core.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
            if step > 6 and not core.has_unfinished_requests():
                break
    assert [tokens[i] for i in range(5)] == [list(o.outputs[0].token_ids) for o in outputs]
    assert (4, 0) in kept and any(0 < after < before for before, after in kept), kept

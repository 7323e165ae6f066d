"""What one request leaves behind, and what one that is refused does, in an engine that goes on; on both runners."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from e2e.engines import generate, make_adapter
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
VOCAB_SIZE = 512
OPTIONS = {"max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
NUM_REQUESTS = 40 if ON_GPU_RUNNER else 1000


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1, num_key_value_heads=1)
    return model, {"model": str(make_adapter(model, tmp_path_factory.mktemp("a"))), "tree": "2,1"}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_ids_behind_the_vocabulary_are_refused_in_a_sentence(case, tokenizer):
    """Plain vLLM's engine dies of them where it has no tokenizer; here they would read mask embeddings."""
    model, bita = case
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=tokenizer)
    with engine(model, bita, skip_tokenizer_init=not tokenizer, **OPTIONS) as llm:
        for wrong in (VOCAB_SIZE, VOCAB_SIZE + 2, 100000, -1):
            with pytest.raises(VLLMValidationError, match=f"[Tt]oken id {wrong}\\b") as error:
                generate(llm, [([5, wrong, 7], params)])
            assert "\n" not in str(error.value)
        (output,) = generate(llm, [([5, VOCAB_SIZE - 1], params)])
        assert len(output.outputs[0].token_ids) == 3


def test_ids_that_only_the_tokenizer_knows_are_refused(case, monkeypatch):
    """vLLM takes the larger one of both vocabularies."""
    model, bita = case
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with engine(model, bita, **OPTIONS) as llm:
        monkeypatch.setattr(type(llm.get_tokenizer()), "max_token_id", VOCAB_SIZE + 8)
        with pytest.raises(VLLMValidationError, match="the model's ids are 0 to 511"):
            generate(llm, [([5, VOCAB_SIZE], params)])
        assert generate(llm, [([5], params)])[0].finished


def sizes(*owners: Any) -> dict[str, int]:
    """Entries of every container that the owners hold."""
    return {
        f"{type(owner).__name__}.{name}": len(value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, (dict, list, set, WeakKeyDictionary)) and isinstance(value, Sized)
    }


def test_finished_and_aborted_requests_leave_nothing(case):
    """One after the other, so that each ends while nothing else runs."""
    model, bita = case
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with engine(model, bita, **OPTIONS) as llm:
        core = llm.llm_engine
        runner = core.model_executor.driver_worker.worker.model_runner
        scheduler = core.engine_core.engine_core.scheduler
        owners = runner, scheduler, scheduler.structured_output_manager
        for number in range(NUM_REQUESTS):
            core.add_request(str(number), {"prompt_token_ids": [3 + number % 500]}, params)
            core.step()
            if number % 3 == 0:
                core.step()
                core.abort_request([str(number)])
            while core.has_unfinished_requests():
                core.step()
            if number == NUM_REQUESTS // 4:
                before = sizes(*owners)
        assert sizes(*owners) == before

"""fp32, V2 runner: the user's own logits processors see a path of the tree as vLLM's see a chain of drafts.

Runs with `pytest --runner gpu`. On the V1 runner they are refused (test_config.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
OPTIONS = {"max_model_len": 128, "max_num_seqs": 5}
PENALTY = 30.0


class NoEcho(LogitsProcessor):
    """Where `extra_args` ask for it, neither of the last two tokens may come again, nor the sum of their ids."""

    def __init__(self, vllm_config, req_states):
        self.states = req_states
        self.asked = torch.zeros(req_states.max_num_reqs, dtype=torch.bool)

    def add_request(self, req_idx, sampling_params):
        self.asked[req_idx] = bool((sampling_params.extra_args or {}).get("no_echo"))
        return bool(self.asked[req_idx])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots, local = ctx.expanded_idx_mapping.long(), ctx.expanded_local_pos.long()
        last = ctx.input_ids.long()
        committed = self.states.total_len.gpu[slots].long()
        before = self.states.all_token_ids.gpu[slots, (committed - 2).clamp(min=0)].long()
        before = torch.where(local > 0, last.roll(1), before)
        rows = torch.nonzero(self.asked[slots]).flatten()
        for token in (last, before, (last + before) % logits.shape[1]):
            logits[rows, token[rows]] -= PENALTY
        return logits


def requests():
    rng = np.random.default_rng(4)
    asks = {"extra_args": {"no_echo": True}}
    bias = {"logit_bias": {77: 8.0, 90: 8.0}}
    kinds = (
        {"temperature": 0, **asks, **bias},
        {"temperature": 1.0, "seed": 3, **asks, **bias},
        {"temperature": 0, **bias},
        {"temperature": 0, "repetition_penalty": 1.2, **asks, **bias},
        {"temperature": 1.0, "seed": 5},
    )
    return [
        (
            rng.integers(3, 500, 6).tolist(),
            SamplingParams(max_tokens=10, ignore_eos=True, **kind),
        )
        for kind in kinds
    ]


def test_output_equals_plain_vllm(tiny_model, tmp_path):
    model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=1)
    adapter = make_adapter(model, tmp_path / "adapter")
    options = {**OPTIONS, "logits_processors": [NoEcho]}
    with engine(model, **options) as llm:
        plain = generate(llm, requests())
    expected = [list(output.outputs[0].token_ids) for output in plain]
    assert set(expected[2]) <= {77, 90} and len(set(expected[0])) > 2, "it does nothing"

    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_steps() as steps, oracle(known(plain)), engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert max(len(step.tokens) for step in steps) == 3, "no walk to the end of the tree"

"""fp32: a thinking budget ends the reasoning where plain vLLM ends it, greedy and seeded; on both runners."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from e2e.engines import Request, generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
# One token, and two of the test models' tokenizer.
START, END = "ab", "cdef"
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 12,
    "long_prefill_token_threshold": 16,
    "reasoning_config": {"reasoning_start_str": START, "reasoning_end_str": END},
}
SMALL = {"num_hidden_layers": 1, "num_key_value_heads": 1}
# Layers with a sliding window have a KV cache group of their own, for which vLLM makes its batch anew.
ARCHITECTURES = {"llama": SMALL}
if not ON_GPU_RUNNER:
    ARCHITECTURES["gemma2"] = {"num_hidden_layers": 2}
SEEDED = {"temperature": 1.0, "seed": 5}


def requests(encode) -> dict[str, Request]:
    """By name; some think from their prompt on, others begin to where the model says so."""
    start, end = encode(START), encode(END)
    begins = {"logit_bias": {start[0]: 5.5}}
    ends = {"logit_bias": {end[0]: 6.0, end[1]: 6.0}}
    cases = {
        "budget 0": (True, {"thinking_token_budget": 0}),
        "budget 1": (True, {"thinking_token_budget": 1}),
        "budget 4, seed": (True, {"thinking_token_budget": 4, **SEEDED}),
        "budget 7, long prompt": (True, {"thinking_token_budget": 7}),
        "budget that is never reached": (True, {"thinking_token_budget": 100}),
        "begins": (False, {"thinking_token_budget": 3, **begins}),
        "begins, seed": (False, {"thinking_token_budget": 3, **SEEDED, **begins}),
        "begins and ends, seed": (
            False,
            {
                "thinking_token_budget": 4,
                **SEEDED,
                "logit_bias": {**begins["logit_bias"], **ends["logit_bias"]},
            },
        ),
        "ends, seed": (True, {"thinking_token_budget": 5, **SEEDED, **ends}),
        "penalty, logprobs": (
            True,
            {"thinking_token_budget": 4, "repetition_penalty": 1.3, "logprobs": 2},
        ),
        "no budget": (True, {}),
        "no budget, seed": (False, SEEDED),
    }
    rng = np.random.default_rng(1)
    return {
        name: (
            rng.integers(10, 250, 40 if "long" in name else 5).tolist()
            + (start if thinks else [])
            + rng.integers(10, 250, 2).tolist(),
            SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **params}),
        )
        for name, (thinks, params) in cases.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thinking_ends_where_plain_vllm_ends_it(tiny_model, tmp_path, architecture):
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    adapter = make_adapter(model, tmp_path / "adapter")
    with engine(model, **OPTIONS) as llm:
        encode = partial(llm.get_tokenizer().encode, add_special_tokens=False)
        end, named = encode(END), requests(encode)
        plain = generate(llm, list(named.values()))
    expected = {name: list(o.outputs[0].token_ids) for name, o in zip(named, plain, strict=True)}
    # The prompt has thought for two tokens already.
    for name, budget in {"budget 0": 2, "budget 4, seed": 4, "budget 7, long prompt": 7}.items():
        assert expected[name][budget - 2 : budget] == end, name
    ended = [name for name, tokens in expected.items() if end[0] in tokens]
    assert {"begins", "begins, seed", "begins and ends, seed", "ends, seed"} <= set(ended), expected
    assert not {"no budget", "budget that is never reached"} & set(ended)

    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_steps() as steps, oracle(known(plain)), engine(model, bita, **OPTIONS) as llm:
        outputs = generate(llm, list(named.values()))
        alone = generate(llm, [named["begins, seed"]])
    for name, output in zip(named, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == expected[name], name
    assert list(alone[0].outputs[0].token_ids) == expected["begins, seed"]
    assert max(len(step.tokens) for step in steps) == 3, "no walk to the end of the tree"

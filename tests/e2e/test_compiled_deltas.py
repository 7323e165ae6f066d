"""fp32, compiled: low-rank deltas for mask rows leave plain vLLM's tokens as they are.

The other tests of deltas run eagerly; here the operation sits in a graph that torch.compile made.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from torch._dynamo.utils import counters
from vllm import SamplingParams
from vllm.config import CompilationMode

from bita_vllm.adapter.checkpoint import Adapter, save_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU_RUNNER, reason="the interpreter runs eagerly"),
]
OPTIONS = {"enforce_eager": False, "max_model_len": 256, "max_num_seqs": 4}


def test_tokens_equal_plain_vllm(tiny_model, tmp_path):
    """Also where deltas that are kept in bfloat16 meet the graph that was compiled for others, kept in fp32."""
    model = tiny_model("llama", num_hidden_layers=2)
    adapter = Adapter.load(make_adapter(model, tmp_path / "random", lora_rank=8))
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    requests = [(rng.integers(3, 500, length).tolist(), params) for length in (5, 20, 33, 9)]
    with engine(model, **OPTIONS) as llm:
        plain = generate(llm, requests)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save_adapter(folder, replace(adapter, mask_lora=adapter.mask_lora.to(dtype)))
        bita = {"model": str(folder), "tree": "3,2"}
        with (
            recorded_steps() as steps,
            oracle(known(plain)),
            engine(model, bita, **OPTIONS) as llm,
        ):
            mode = llm.llm_engine.vllm_config.compilation_config.mode
            outputs = generate(llm, requests)
        assert mode in (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
        for ours, theirs in zip(outputs, plain, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert max(len(step.tokens) for step in steps) == 3, "no tree was accepted to its end"


def test_a_second_start_compiles_nothing(tiny_model, tmp_path, monkeypatch):
    """Neither form of the model; vLLM's own way to keep them fails on a CPU, and compiles at each start."""
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = tiny_model("llama", num_hidden_layers=1)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=8)
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with engine(model, {"model": str(adapter), "tree": "2,1"}, **OPTIONS):
            of_cache = counters["inductor"]
            found.append((of_cache["fxgraph_cache_miss"], of_cache["fxgraph_cache_hit"]))
    (missed, _), (missed_again, hit) = found
    assert missed == hit == 2, found
    assert missed_again == 0

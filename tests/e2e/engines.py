"""Real vLLM engines inside the test process: plain and bita on the same requests.

In the process, so that a test can look into the runner and put known tokens into its blocks
(inspection.py). Prompts are token ids; an engine is freed when its `with` block ends.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from testbed import v2_on_cpu
from transformers import AutoModelForCausalLM
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.v1.executor import multiproc_executor

from bita_vllm import config as bita_config
from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.system import platform
from bita_vllm.training.mask_lora import MaskLora

# `pytest --runner gpu`: vLLM's V2 runner, through Triton's interpreter (v2_on_cpu.py)
ON_GPU_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
NEAR_TIE = 1e-4  # of the base model's top two logits: there, fp32 rounding may choose the token

# vLLM and torch are half a second of every collection, and each engine's end is one.
gc.freeze()
atexit.register(gc.unfreeze)  # else libraries report at the end what was not freed

Request = tuple[list[int], SamplingParams]  # a prompt's token ids, and what is asked for
Requests = Sequence[Request]


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """One for tiny models: on a busy machine they would wait for the second most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def idle_threads() -> int:
    """Every core for a larger model, unless others use them: then threads wait for each other."""
    return psutil.cpu_count() if psutil.cpu_percent(interval=1) < 25 else 1


@contextmanager
def in_this_process(num_ranks: int = 1) -> Iterator[None]:
    """Engines started inside run in this process, on the runner that is tested; of several ranks, in its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it: put back
        # vLLM does it a dozen times an engine: seconds, as long as all the rest of a tiny one's start.
        patch.setattr(gc, "collect", lambda generation=2: 0)
        # What has been imported stays out of the collector's way, whatever vLLM says at an engine's start and end.
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        if num_ranks > 1:
            _fork_ranks(patch)
        if ON_GPU_RUNNER:
            from vllm.v1.attention.backends import triton_attn
            from vllm.v1.attention.ops import triton_unified_attention
            from vllm.v1.sample.ops import topk_topp_sampler
            from vllm.v1.worker.gpu.sample.sampler import Sampler

            patch.setattr(Sampler, "sample", v2_on_cpu.minding_types(Sampler.sample))
            patch.setattr(platform, "on_gpu", lambda: True)
            patch.setattr(bita_config, "GPU_WORKER_CLS", "testbed.v2_on_cpu.Worker")
            patch.setattr(triton_attn, "triton_reshape_and_cache_flash", v2_on_cpu.write_kv)
            # Its Triton kernel does not run in the interpreter; the other path is vLLM's too.
            patch.setattr(topk_topp_sampler, "HAS_TRITON", False)
            # The interpreter's time goes by the number of tiles.
            patch.setattr(triton_unified_attention, "_get_tile_size", lambda *a, **k: 128)
        yield


@contextmanager
def engine(
    model: Path, bita: dict[str, Any] | None = None, threads: int = 1, **options: Any
) -> Iterator[LLM]:
    """An engine in this process; `bita` is the speculative config less the method."""
    if bita is not None:
        options["speculative_config"] = {"method": "bita", **bita}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "block_size": 32,
        "disable_log_stats": False,
        # All of it is written at the start.
        "kv_cache_memory_bytes": 2**27 if ON_GPU_RUNNER else 2**28,
    }
    with torch_threads(threads), in_this_process(options.get("tensor_parallel_size", 1)):
        llm = LLM(str(model), **{**defaults, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
    gc.collect()


def _fork_ranks(patch: pytest.MonkeyPatch) -> None:
    """Ranks start with what this process has: its one thread, our patches, and vLLM, whose import takes long."""
    patch.setattr(multiproc_executor, "get_mp_context", lambda: get_context("fork"))
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Compiled in every engine, which takes seconds, and which the interpreter's stand-in driver cannot.
    compiled = vocab_parallel_embedding.get_masked_input_and_mask
    patch.setattr(vocab_parallel_embedding, compiled.__name__, inspect.unwrap(compiled))


def generate(llm: LLM, requests: Requests) -> list[RequestOutput]:
    """All requests at once, outputs in their order."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    return llm.generate(prompts, [params.clone() for _, params in requests], use_tqdm=False)


def run(
    model: Path, requests: Requests, bita: dict[str, Any] | None = None, **options: Any
) -> list[RequestOutput]:
    """`generate` in an engine of its own."""
    with engine(model, bita, **options) as llm:
        return generate(llm, requests)


@dataclass(frozen=True)
class Difference:
    """Where a greedy output leaves plain vLLM's, and the gap of plain vLLM's own top two logits."""

    request: int
    position: int
    plain: int
    bita: int
    gap: float
    top: float  # the first of the two: a logprob, or a logit with logprobs_mode='raw_logits'


def differences(
    plain_llm: Callable[[], Any],
    requests: Requests,
    plain: Sequence[RequestOutput],
    bita: Sequence[RequestOutput],
) -> list[Difference]:
    """First difference of every request whose tokens differ, one output a request.

    `plain_llm` starts a plain engine (a `with engine(...)` target); only if there is a difference.
    """
    found = []
    for i, (a, b) in enumerate(zip(plain, bita, strict=True)):
        x, y = (list(output.outputs[0].token_ids) for output in (a, b))
        if x != y:
            pairs = list(zip_longest(x, y, fillvalue=-1))
            position = next(n for n, (p, q) in enumerate(pairs) if p != q)
            found.append((i, position, *pairs[position]))
    if not found:
        return []
    top_two = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    again = [
        (requests[i][0] + list(plain[i].outputs[0].token_ids[:position]), top_two)
        for i, position, _, _ in found
    ]
    with plain_llm() as llm:
        tops = generate(llm, again)
    result = []
    for place, output in zip(found, tops, strict=True):
        first, second = sorted(p.logprob for p in output.outputs[0].logprobs[0].values())[:-3:-1]
        result.append(Difference(*place, gap=first - second, top=first))
        print(result[-1])
    return result


def metric(llm: LLM, name: str) -> int:
    """The counter `vllm:NAME`, over all engines of the process: take differences."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def make_adapter(
    model: Path, folder: Path, num_mask_tokens: int = 3, seed: int = 0, lora_rank: int = 0
) -> Path:
    """A random adapter for a tiny model; with a `lora_rank`, random deltas as large as its weights."""
    config = json.loads((model / "config.json").read_text())
    shape = ModelShape.from_hf_config(config)
    adapter = random_adapter(
        shape, num_mask_tokens, 4, seed, embedding_std=0.15, prompt_std=0.5, verifier=str(model)
    )
    if lora_rank:
        adapter = replace(adapter, mask_lora=random_mask_lora(model, lora_rank, seed))
    save_adapter(folder, adapter)
    return folder


def random_mask_lora(model: Path, rank: int, seed: int = 0) -> MaskLoraWeights:
    """Deltas on every linear layer of a tiny model's decoder: A and B random, alpha twice the rank."""
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = MaskLora.for_model(base, rank, alpha=2 * rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for b in lora.lora_b:
        b.data.normal_(std=0.5 / rank**0.5, generator=generator)
    return lora.weights(base)

"""vLLM engines in this process, on the runner that is tested: the V2 runner through Triton's interpreter."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.models import registry
from vllm.v1.executor import multiproc_executor

from bita_vllm import config as bita_config
from bita_vllm.system import platform
from testbed import v2_on_cpu

# `pytest --runner gpu`: vLLM's V2 runner, through Triton's interpreter (v2_on_cpu.py)
ON_GPU_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

# vLLM and torch are half a second of every collection, and each engine's end is one.
gc.freeze()
atexit.register(gc.unfreeze)  # else libraries report at the end what was not freed


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
        # vLLM looks at a model's class in a process of its own, which imports for seconds.
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
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

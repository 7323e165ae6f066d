"""vLLM's Model Runner V2 on a machine without a GPU: Triton's interpreter and a stand-in driver.

Test equipment only: slow and exact. `install()` must run before triton or vllm is imported; it holds
for the whole process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import wraps
from inspect import signature
from types import SimpleNamespace

from testbed.quick_interpreter import quicken

RUNNER_ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # No profile run: it feeds NaNs.
    "VLLM_CPU_CI_ENV": "1",
}


def install() -> None:
    """Kernels run interpreted; vLLM finds a Triton driver, and takes its V2 runner."""
    os.environ.update(RUNNER_ENVIRONMENT)
    import torch
    import triton.backends
    import triton.runtime.driver
    from triton.backends.compiler import GPUTarget

    class Driver:
        """What Triton and vLLM ask a driver for."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=Driver)
    triton.runtime.driver._active = Driver()
    _allow_integer_masks()
    quicken()
    _without_overflow_checks()
    # vLLM's cache writer asks before it launches.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


def _allow_integer_masks() -> None:
    """vLLM's grammar kernel ends up with one; the compiler takes it, the interpreter's store does not."""
    import triton.runtime.interpreter as interpreter

    store = interpreter.InterpreterBuilder.create_masked_store

    def masked_store(self, ptrs, value, mask, cache_policy):
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, cache_policy)

    interpreter.InterpreterBuilder.create_masked_store = masked_store


def _without_overflow_checks() -> None:
    """Every sum of integers is computed again in 64 bits; tests/kernels leave it at that."""
    import triton.runtime.interpreter as interpreter

    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


def write_kv(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
) -> None:
    """vLLM's kernel of that name, interpreted, takes a third of a step: a program a row and head."""
    import torch

    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for cache, rows, scale in ((key_cache, key, k_scale), (value_cache, value, v_scale)):
        rows = rows[: len(kept)][kept]
        if kv_cache_dtype.startswith("fp8"):  # a GPU's cast saturates, torch's gives NaN
            most = torch.finfo(cache.dtype).max
            rows = (rows / scale).clamp(-most, most).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache[block, offset] = rows


def minding_types(sample):
    """vLLM's `Sampler.sample`, refusing types that its kernels do not compile for: the interpreter takes any."""
    import torch

    expected = {
        "pos": torch.int64,
        "input_ids": torch.int32,
        "expanded_local_pos": torch.int32,
    }

    @wraps(sample)
    def checked(*args, **kwargs):
        given = signature(sample).bind(*args, **kwargs).arguments
        types = {name: given[name].dtype for name in expected}
        assert types == expected, types
        return sample(*args, **kwargs)

    return checked


def __getattr__(name: str) -> type:
    """`Worker`: a CPU worker that runs the GPU runner; made when asked for, as it imports vLLM."""
    if name != "Worker":
        raise AttributeError(name)
    from bita_kernels import add_mask_lora, tree_attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.worker.cpu import model_runner as cpu_v2
    from vllm.v1.worker.cpu_worker import CPUWorker

    from bita_vllm.runner.gpu import BitaGPUModelRunner
    from bita_vllm.runner.loading import replaced

    # A tiny model's contexts are short: some go in turn, longer ones have their splits side by side.
    tree_attention.SHORT_CONTEXT = 128
    choose_tiles = add_mask_lora.choose_tiles

    def wide_tiles(in_features, rank, element_size):
        tiles = choose_tiles(in_features, rank, element_size)
        return replace(tiles, rows=64, low=128, step=512, out=512)

    class Runner(BitaGPUModelRunner, cpu_v2.CPUModelRunner):
        attention_backend = AttentionBackendEnum.CPU_ATTN

        def _attention_config(self, impl):
            # Tiles for a GPU's registers are small, and the interpreter's time goes by their number.
            # Short splits: a tiny model's contexts take several, side by side.
            return replace(super()._attention_config(impl), block_m=64, block_n=128, split=128)

        def load_model(self, *args, **kwargs):
            super().load_model(*args, **kwargs)
            add_mask_lora.choose_tiles = wide_tiles

    class Worker(CPUWorker):
        def init_device(self) -> None:
            with replaced(cpu_v2, "CPUModelRunner", Runner):
                super().init_device()

    return Worker

"""vLLM's Model Runner V2 on a machine without a GPU: Triton's interpreter and a stand-in driver.

Test equipment only: slow and exact. `install()` must run before triton or vllm is imported; it holds
for the whole process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

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
    # vLLM's cache writer asks before it launches.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


def __getattr__(name: str) -> type:
    """`Worker`: a CPU worker that runs the GPU runner; made when asked for, as it imports vLLM."""
    if name != "Worker":
        raise AttributeError(name)
    from bita_kernels import add_mask_lora
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.worker.cpu import model_runner as cpu_v2
    from vllm.v1.worker.cpu_worker import CPUWorker

    from bita_vllm.runner.gpu import BitaGPUModelRunner
    from bita_vllm.runner.loading import replaced

    class Runner(BitaGPUModelRunner, cpu_v2.CPUModelRunner):
        attention_backend = AttentionBackendEnum.CPU_ATTN

        def load_model(self, *args, **kwargs):
            super().load_model(*args, **kwargs)
            # Tiles for a GPU's registers are small; the interpreter's time goes by their number.
            for layer in get_layers_from_vllm_config(self.vllm_config, Attention).values():
                layer.impl.config = replace(layer.impl.config, block_m=64, block_n=128)
            add_mask_lora.TILES = add_mask_lora.Tiles(rows=64, low=128, step=512, out=512)

    class Worker(CPUWorker):
        def init_device(self) -> None:
            with replaced(cpu_v2, "CPUModelRunner", Runner):
                super().init_device()

    return Worker

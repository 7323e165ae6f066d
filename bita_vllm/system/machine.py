"""Which machine this is: what step cost was measured on, where a benchmark ran, how fast its GPU is."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# bf16 operations with fp32 sums that a CUDA core's share of the tensor cores does in a clock, by compute capability.
# From NVIDIA's data sheets: dense TFLOP/s over CUDA cores and boost clock. Where GeForce parts have half of what the
# professional ones have (8.6, 8.9, 12.0), theirs: too few rows cost less than too many.
OPERATIONS_PER_CORE = {
    (8, 0): 32, (8, 6): 4, (8, 7): 4, (8, 9): 4, (9, 0): 32, (10, 0): 64, (10, 3): 64, (12, 0): 4, (12, 1): 4
}  # fmt: skip
# What large copies and products reach of the peak at the highest clocks. On an H100 a copy reaches 3.0 of 3.35 TB/s;
# 0.6 is 640 TFLOP/s there, what products of some hundred rows may be expected to reach.
READ_SHARE = 0.9
PRODUCT_SHARE = 0.6


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device reaches, not its data sheet.

    Attributes:
        bytes_per_second: of its memory.
        flops_per_second: in bf16 products.
    """

    bytes_per_second: float
    flops_per_second: float

    @property
    def knee(self) -> float:
        """Rows of a step at which bf16 products take as long as reading their weights: two bytes, two operations."""
        return self.flops_per_second / self.bytes_per_second


def cpu_name() -> str:
    """Model name and generation: hypervisors often hide the model, as in 'AMD EPYC'."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def is_plain_avx2() -> bool:
    """Whether the CPU has AVX2 and nothing wider, as torch uses it."""
    import torch

    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_speed(nvml: Any, index: int) -> DeviceSpeed | None:
    """Speed of a GPU from its clocks, memory bus and cores; None if NVML or this table does not know it.

    Asked of NVML, not of torch.cuda: a process that has looked at CUDA cannot fork workers any more.

    Args:
        nvml: the `pynvml` module.
        index: physical index of the GPU.
    """
    try:
        nvml.nvmlInit()
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            memory_clock = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_MEM)
            bus_bytes = nvml.nvmlDeviceGetMemoryBusWidth(device) / 8
            clock = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)
            cores = nvml.nvmlDeviceGetNumGpuCores(device)
            capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(device))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None
    operations = OPERATIONS_PER_CORE.get(capability, 0)
    read = READ_SHARE * 2 * memory_clock * bus_bytes  # two transfers a clock, as NVML counts clocks
    computed = PRODUCT_SHARE * operations * cores * clock
    return DeviceSpeed(read, computed) if read > 0 and computed > 0 else None

"""What steps run on here: a GPU on vLLM's V2 runner, or the CPU on its V1 runner."""

from __future__ import annotations

from vllm.platforms import CpuArchEnum, current_platform

from bita_vllm.system.machine import DeviceSpeed, cpu_name, gpu_speed


def on_gpu() -> bool:
    """Whether this process serves on vLLM's V2 runner: on a CUDA GPU."""
    return current_platform.is_cuda()


def on_cpu() -> bool:
    """Whether this process serves on vLLM's V1 runner: on a CPU."""
    return current_platform.is_cpu()


def on_x86() -> bool:
    """Whether this process runs on an x86-64 CPU."""
    return current_platform.get_cpu_architecture() == CpuArchEnum.X86


def device_name() -> str:
    """What steps run on here: the GPU, or the CPU."""
    return current_platform.get_device_name() if on_gpu() else cpu_name()


def speed_of_first_gpu() -> DeviceSpeed | None:
    """What the first GPU of this process reaches; None if NVML does not describe it."""
    from vllm.utils.import_utils import import_pynvml

    try:
        index = current_platform.device_id_to_physical_device_id(0)
    except ValueError:  # CUDA_VISIBLE_DEVICES names a part of a GPU
        return None
    return gpu_speed(import_pynvml(), index)

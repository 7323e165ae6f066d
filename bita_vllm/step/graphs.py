"""CUDA graphs of step blocks: the batch sizes for which a width has one, and those for which it may be chosen.

vLLM captures graphs of up to 512 rows (1024 on some GPUs), which is 9 requests with the paper's tree. A larger decode
step would run without a graph. Source: VllmConfig._set_cudagraph_sizes (vllm/config/vllm.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def user_chose_sizes(args: EngineArgs) -> bool:
    """Whether the user chose the capture sizes. If so, they stay as they are."""
    compilation = args.compilation_config
    return any(
        getattr(owner, name, None) is not None
        for owner in (args, compilation)
        for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
    )


def cover_widths(vllm_config: VllmConfig) -> None:
    """Plan FULL graphs of blocks for every batch that may have them.

    vLLM's own capture sizes stay as they are: plain steps and piecewise graphs use them.
    """
    if not vllm_config.compilation_config.cudagraph_capture_sizes:
        return
    spec: Any = vllm_config.speculative_config
    spec.graph_batches = {
        width: batch_sizes(most) for width, most in most_requests(vllm_config).items() if width
    }


def most_requests(vllm_config: VllmConfig) -> dict[int, int]:
    """Width -> the most requests of a step that may have it.

    The table from batch size to width may change while serving (scheduling/online.py). Its largest step with blocks, in
    rows, bounds all widths: a step of more rows would cost more than any that was found to pay.
    """
    scheduler = vllm_config.scheduler_config
    named = _widest_batches(vllm_config)
    rows = max((n * (width + 1) for width, n in named.items() if width), default=0)
    rows = min(rows, scheduler.max_num_batched_tokens)
    return {
        width: min(scheduler.max_num_seqs, rows // (width + 1)) if width else scheduler.max_num_seqs
        for width in named
    }


def _widest_batches(vllm_config: VllmConfig) -> dict[int, int]:
    """Width -> the most requests that the table has it for."""
    most = vllm_config.scheduler_config.max_num_seqs
    width = vllm_config.num_speculative_tokens
    assert vllm_config.speculative_config is not None
    schedule = vllm_config.speculative_config.num_speculative_tokens_per_batch_size
    if schedule is None:
        return {width: most}
    lookup = build_dynamic_sd_schedule_lookup(schedule, most, width)
    return {lookup[n]: n for n in range(1, most + 1)}


def batch_sizes(most: int) -> list[int]:
    """Numbers of requests that a graph is captured for, spaced as vLLM's. A batch in between is padded to the next."""
    steps = [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if n < most]
    return [*steps, most] if most else []

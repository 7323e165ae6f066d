"""CUDA graph sizes that cover every width of step blocks at the batch sizes that use it.

vLLM stops at 512 rows of a step (1024 on some GPUs), which is 9 requests of the paper's tree; behind
that a decode step would run without a graph. Source: VllmConfig._set_cudagraph_sizes (vllm/config/vllm.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def user_chose_sizes(args: EngineArgs) -> bool:
    """Whether the capture sizes are the user's own: then they stay as they are."""
    compilation = args.compilation_config
    return any(
        getattr(owner, name, None) is not None
        for owner in (args, compilation)
        for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
    )


def cover_widths(vllm_config: VllmConfig) -> None:
    """Add capture sizes until every decode batch that fits in a step has a FULL graph of its width."""
    compilation = vllm_config.compilation_config
    if not compilation.cudagraph_capture_sizes:
        return
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    sizes = set(compilation.cudagraph_capture_sizes)
    for width, most in widest_batches(vllm_config).items():
        rows = width + 1
        sizes.update(n * rows for n in batch_sizes(min(most, budget // rows)))
    compilation.cudagraph_capture_sizes = sorted(sizes)
    compilation.max_cudagraph_capture_size = max(sizes)
    compilation.post_init_cudagraph_sizes()


def widest_batches(vllm_config: VllmConfig) -> dict[int, int]:
    """Width -> the most requests that are scheduled with it."""
    most = vllm_config.scheduler_config.max_num_seqs
    width = vllm_config.num_speculative_tokens
    schedule = vllm_config.speculative_config.num_speculative_tokens_per_batch_size
    if schedule is None:
        return {width: most}
    lookup = build_dynamic_sd_schedule_lookup(schedule, most, width)
    return {lookup[n]: n for n in range(1, most + 1)}


def batch_sizes(most: int) -> list[int]:
    """Requests that a graph is captured for; a batch in between is padded to the next. Steps as vLLM's."""
    steps = [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if n < most]
    return [*steps, most] if most else []

"""vLLM's CUDA graph manager, when several widths share it.

vLLM offers a batch the graphs of the next larger number of rows only, and those may all be of another
width; and it captures every width at every size. Source: vllm/v1/worker/gpu/cudagraph_utils.py.
"""

from __future__ import annotations

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from bita_vllm.graphs import widest_batches


class WidthGraphManager(ModelCudaGraphManager):
    """Every decode batch finds the next larger FULL graph of its own width."""

    def _init_candidates(self) -> None:
        """Stock; then FULL graphs by width, up to the largest batch that is scheduled with it.

        Smaller batches than a width is for keep theirs: a batch that shrinks runs once more at its old width.
        """
        super()._init_candidates()
        most = {width + 1: n for width, n in widest_batches(self.vllm_config).items()}
        by_width: dict[tuple[int, int], list[BatchExecutionDescriptor]] = {}
        for desc in reversed(self._capture_descs.get(CUDAGraphMode.FULL, [])):  # ascending
            if desc.uniform_token_count is None:
                return  # FULL graphs of mixed batches: not by width
            kept = by_width.setdefault((desc.uniform_token_count, desc.num_active_loras), [])
            if not kept or kept[-1].num_reqs < most[desc.uniform_token_count]:
                kept.append(desc)
        for key, descs in self._candidates.items():
            self._candidates[key] = [desc for desc in descs if desc.cg_mode != CUDAGraphMode.FULL]
        for (_, num_loras), descs in by_width.items():
            first = 0
            for desc in descs:
                for num_tokens in range(first, desc.num_tokens + 1):
                    # in front of the piecewise ones
                    self._candidates.setdefault((num_tokens, num_loras), []).insert(0, desc)
                first = desc.num_tokens + 1
        full = [desc for descs in by_width.values() for desc in descs]
        if full:
            full.sort(key=lambda desc: desc.num_tokens, reverse=True)
            self._capture_descs[CUDAGraphMode.FULL] = full

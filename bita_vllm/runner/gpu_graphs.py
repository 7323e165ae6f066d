"""vLLM's CUDA graph manager, when several widths share it.

vLLM offers a batch the graphs of the next larger number of rows only, and those may all be of another
width; and it captures every width at every size. Source: vllm/v1/worker/gpu/cudagraph_utils.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from bita_vllm.step.graphs import most_requests
from bita_vllm.step.settings import BitaSpeculativeConfig

# Piecewise graphs with low-rank deltas are told apart by vLLM's number of active LoRA adapters: bita runs without
# vLLM's LoRA, so it has no other meaning.
PLAIN, WITH_DELTAS = 0, 1


class WidthGraphManager(ModelCudaGraphManager):
    """Every decode batch finds the next larger FULL graph of its own width; plain steps find vLLM's own.

    Attributes:
        step_has_blocks: whether the step has, for which a graph is looked up.
    """

    step_has_blocks = False

    def _init_candidates(self) -> None:
        """Stock; then FULL graphs by width, and piecewise ones with deltas next to those without."""
        super()._init_candidates()
        spec = self.vllm_config.speculative_config
        assert isinstance(spec, BitaSpeculativeConfig)
        self.has_deltas = spec.bita.mask_lora is not None
        if self._capture_descs.get(CUDAGraphMode.FULL):
            self._widths_have_graphs(spec.graph_batches)
        piecewise = self._capture_descs.get(CUDAGraphMode.PIECEWISE)
        if piecewise and self.has_deltas:
            self._capture_descs[CUDAGraphMode.PIECEWISE] = [
                desc for stock in piecewise for desc in (stock, _with_deltas(stock))
            ]

    def _widths_have_graphs(self, graph_batches: dict[int, list[int]] | None) -> None:
        """FULL graphs of blocks for `graph_batches`, width -> requests; where it is None, at the user's sizes."""
        by_width: dict[int, list[BatchExecutionDescriptor]] = defaultdict(list)
        most = most_requests(self.vllm_config)
        for desc in reversed(self._capture_descs[CUDAGraphMode.FULL]):  # ascending
            assert desc.uniform_token_count is not None, (
                "our attention has no FULL graphs of mixed steps"
            )
            kept, width = by_width[desc.uniform_token_count], desc.uniform_token_count - 1
            if not kept or kept[-1].num_reqs < most[width]:
                kept.append(desc)
        for width, batches in (graph_batches or {}).items():
            rows = width + 1
            by_width[rows] = [
                BatchExecutionDescriptor(CUDAGraphMode.FULL, n * rows, n, uniform_token_count=rows)
                for n in batches
            ]
        for key, descs in self._candidates.items():
            self._candidates[key] = [desc for desc in descs if desc.cg_mode != CUDAGraphMode.FULL]
        for descs in by_width.values():
            first = 0
            for desc in descs:
                for num_tokens in range(first, desc.num_tokens + 1):
                    # in front of the piecewise ones
                    self._candidates.setdefault((num_tokens, PLAIN), []).insert(0, desc)
                first = desc.num_tokens + 1
        full = [desc for descs in by_width.values() for desc in descs]
        full.sort(key=lambda desc: desc.num_tokens, reverse=True)
        self._capture_descs[CUDAGraphMode.FULL] = full

    def dispatch(self, *args: Any, **kwargs: Any) -> BatchExecutionDescriptor:
        """Stock; of two piecewise graphs the one with deltas for a step with blocks."""
        desc = super().dispatch(*args, **kwargs)
        if self.has_deltas and self.step_has_blocks and desc.cg_mode == CUDAGraphMode.PIECEWISE:
            return _with_deltas(desc)
        return desc

    def capture(self, model: Any, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Stock; the model state knows which of two piecewise graphs is captured."""

        def before_capture(num_active_loras: int, num_reqs: int, num_tokens: int) -> None:
            model_state.captures_deltas = num_active_loras == WITH_DELTAS

        kwargs["lora_capture_hook"] = before_capture
        try:
            super().capture(model, model_state, *args, **kwargs)
        finally:
            model_state.captures_deltas = False


def _with_deltas(desc: BatchExecutionDescriptor) -> BatchExecutionDescriptor:
    return replace(desc, num_active_loras=WITH_DELTAS)

"""In vLLM's drafter seat of the V2 runner: the next blocks, from what the walk left.

Source of the hooks: vllm/v1/worker/gpu/spec_decode/speculator.py.
"""

from __future__ import annotations

from typing import Any

import torch
from bita_kernels.build_block import build_block
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from bita_vllm.runner.gpu_step import GPUStep
from bita_vllm.runner.sources import GPUSource, gpu_source
from bita_vllm.step.device import StepTrees


class BlockSpeculator(BaseSpeculator):
    """Makes the next blocks from what a source of drafts gives; there is no draft model."""

    draft_logits = None
    supports_mm_inputs = False
    enable_adaptive_verification = False
    source: GPUSource
    _step: GPUStep | None = None

    def __init__(
        self,
        max_num_reqs: int,
        num_drafts: int,
        vocab_size: int,
        req_states: Any,
        source: str,
        device: torch.device,
    ) -> None:
        """`source`: of drafts, by its name in `sources.py`."""
        self.vocab_size, self._req_states, self._source_name = vocab_size, req_states, source
        # [max_num_reqs, R-1] the next block of each request of the step, in batch order
        self.draft_tokens = torch.zeros(max_num_reqs, num_drafts, dtype=torch.int64, device=device)

    def attach(self, model: Any, trees: StepTrees) -> None:
        """Take the loaded model, whose output head a source may use, and the trees of its steps."""
        self.trees = trees
        self.source = gpu_source(
            self._source_name, model.compute_logits, trees, self._req_states, self.vocab_size
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of its own to capture."""

    def capture(self) -> None:
        """Nothing of its own to capture."""

    def follow(self, step: GPUStep) -> None:
        """The next blocks are those after this step."""
        self._step = step

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        # [rows, H]
        last_hidden_states: torch.Tensor,
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[num_reqs, R-1]` int64; `num_speculative_tokens` says for which template. Width 0 drafts nothing."""
        n, trees = input_batch.num_reqs, self.trees
        step, self._step = self._step, None
        if dummy_run or step is None or not num_speculative_tokens:
            return self.draft_tokens[:n]
        index = trees.set_of(num_speculative_tokens)
        build_block(
            self.source(step, last_hidden_states, index),
            input_batch.idx_mapping,
            self.vocab_size,
            trees.table,
            trees.choice,
            index,
            self.draft_tokens[:n],
            trees.line_of_slot,
        )
        trees.expect_blocks(input_batch, index)
        return self.draft_tokens[:n]

"""In vLLM's drafter seat of the V2 runner: the next blocks, from what the walk left behind.

Source of the hooks: vllm/v1/worker/gpu/spec_decode/speculator.py.
"""

from __future__ import annotations

from typing import Any

import torch
from bita_kernels.build_block import build_block, workspace_shape
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from bita_vllm.runner.gpu_trees import StepTrees


def parts_of(num_requests: int, rows_each: int, vocab_size: int) -> list[slice]:
    """Runs of requests whose logits are held at once: as many as vLLM's rejection sampler holds."""
    most = max(1, get_max_chunk_logits(vocab_size) // rows_each)
    return [slice(start, min(start + most, num_requests)) for start in range(0, num_requests, most)]


class BlockSpeculator(BaseSpeculator):
    """Makes the next blocks from what the walk left; there is no draft model."""

    draft_logits = None
    supports_mm_inputs = False
    enable_adaptive_verification = False
    # Whether a request of the step has a grammar: bitmasks are made for first templates only (`grammar.py`).
    constrained = False

    def __init__(self, max_num_reqs: int, num_drafts: int, device: torch.device) -> None:
        # [max_num_reqs, R-1] the next block of each request of the step, in batch order
        self.draft_tokens = torch.zeros(max_num_reqs, num_drafts, dtype=torch.int64, device=device)

    def load(self, model: Any, trees: StepTrees, vocab_size: int) -> None:
        """The model is there: its output head makes candidates."""
        self.compute_logits, self.trees, self.vocab_size = model.compute_logits, trees, vocab_size
        self.workspace = torch.empty(
            workspace_shape(len(self.draft_tokens), vocab_size, trees.table),
            dtype=torch.int64,
            device=self.draft_tokens.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of its own to capture."""

    def capture(self) -> None:
        """Nothing of its own to capture."""

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
        n = input_batch.num_reqs
        if dummy_run or not num_speculative_tokens:
            return self.draft_tokens[:n]
        trees = self.trees
        lines = []
        # Choosing among trees takes two fp32 copies of the logits for a moment.
        for part in parts_of(n, 2 * trees.table.max_depth, self.vocab_size):
            rows, logits_rows = trees.candidate_rows(part, num_speculative_tokens)
            if input_batch.num_draft_tokens:
                logits = self.compute_logits(last_hidden_states[rows])
            else:  # no candidates: no row of the logits is read
                logits = last_hidden_states.new_empty(1, self.vocab_size).expand(len(rows), -1)
            only_first = self.constrained or not input_batch.num_draft_tokens
            line = trees.choose_lines(part, num_speculative_tokens, logits, only_first)
            lines.append(line)
            num_logits = (part.stop - part.start) * trees.table.max_depth
            build_block(
                logits,
                logits_rows,
                line,
                self.vocab_size,
                trees.table,
                self.workspace[:num_logits],
                self.draft_tokens[part],
            )
        trees.keep_lines(input_batch, torch.cat(lines), num_speculative_tokens)
        return self.draft_tokens[:n]

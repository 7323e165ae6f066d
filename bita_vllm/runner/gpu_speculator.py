"""In vLLM's drafter seat of the V2 runner: the next blocks, from what the walk left.

Source of the hooks: vllm/v1/worker/gpu/spec_decode/speculator.py.
"""

from __future__ import annotations

from typing import Any

import torch
from bita_kernels.build_block import build_block
from bita_kernels.rank_tokens import Ranking
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from bita_vllm.step.device import StepTrees
from bita_vllm.system.machine import DeviceSpeed

# Slices of int32 buffers that begin at a multiple of it are aligned to 16 bytes: Triton compiles for others anew.
ALIGNED_REQUESTS = 4

# Rows of one pass of the output head over nodes and all mask rows that may be chosen, over the knee's. Up to the knee
# a pass takes as long as reading the weights, and two passes read them twice, so one pass over a few rows more is
# still shorter, also where its last tile of 128 rows is nearly empty. If the knee is not known: two tiles of 64 rows.
KNEES_IN_ONE_PASS = 1.25
MAX_ROWS_IN_ONE_PASS = 128


def rows_in_one_pass(num_ranks: int, vocab_size: int, speed: DeviceSpeed | None = None) -> int:
    """Most rows that get logits at once for nodes and mask rows together; else mask rows have a pass of their own.

    A tensor-parallel rank reads its share of the weights only, but gathers all logits, so fewer rows pay.
    """
    most = MAX_ROWS_IN_ONE_PASS if speed is None else int(KNEES_IN_ONE_PASS * speed.knee)
    return min(most // num_ranks, get_max_chunk_logits(vocab_size))


def parts_of(num_requests: int, rows_each: int, vocab_size: int) -> list[slice]:
    """Runs of requests whose logits are held at once: as many as vLLM's rejection sampler holds."""
    most = max(1, get_max_chunk_logits(vocab_size) // rows_each)
    if most > ALIGNED_REQUESTS:
        most -= most % ALIGNED_REQUESTS
    return [slice(start, min(start + most, num_requests)) for start in range(0, num_requests, most)]


class BlockSpeculator(BaseSpeculator):
    """Makes the next blocks from what the walk left; there is no draft model.

    Attributes:
        logits: `[rows, V]` of the step's nodes and mask rows, where one pass gave both; None after `propose`.
    """

    draft_logits = None
    supports_mm_inputs = False
    enable_adaptive_verification = False
    logits: torch.Tensor | None = None

    def __init__(self, max_num_reqs: int, num_drafts: int, device: torch.device) -> None:
        # [max_num_reqs, R-1] the next block of each request of the step, in batch order
        self.draft_tokens = torch.zeros(max_num_reqs, num_drafts, dtype=torch.int64, device=device)

    def load(self, model: Any, trees: StepTrees, vocab_size: int) -> None:
        """The model is there: its output head makes candidates."""
        self.compute_logits, self.trees, self.vocab_size = model.compute_logits, trees, vocab_size
        self.ranking = Ranking.of(len(self.draft_tokens), vocab_size, trees.table)

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
        n, trees = input_batch.num_reqs, self.trees
        logits, self.logits = self.logits, None
        if dummy_run or not num_speculative_tokens:
            return self.draft_tokens[:n]
        index = trees.set_of(num_speculative_tokens)
        if logits is not None or not input_batch.num_draft_tokens:
            self._build(slice(0, n), index, input_batch, logits, trees.mask_rows[:n])
        else:
            for part in parts_of(n, trees.table.max_depth, self.vocab_size):
                rows = trees.candidate_rows(part, index)
                # -1, where a request has fewer candidates, takes the last row: nobody looks at its logits.
                chosen = self.compute_logits(last_hidden_states[rows].flatten(0, 1))
                self._build(part, index, input_batch, chosen, trees.candidate_places(part, index))
        trees.expect_blocks(input_batch, index)
        return self.draft_tokens[:n]

    def _build(
        self,
        part: slice,
        set_index: int,
        input_batch: InputBatch,
        # [number of rows, V]; None without candidates
        logits: torch.Tensor | None,
        # [requests of the part, max_depth] int64
        logits_rows: torch.Tensor,
    ) -> None:
        """Choose and write the next blocks of some requests."""
        trees = self.trees
        build_block(
            logits,
            logits_rows,
            trees.next_depths[part],
            input_batch.idx_mapping[part],
            self.vocab_size,
            trees.table,
            trees.choice,
            set_index,
            self.ranking,
            self.draft_tokens[part],
            trees.line_of_slot,
        )

"""What the sampler of a step on the V2 runner leaves for the next blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass
class GPUStep:
    """One step, from its sampler to the next blocks. Where walks went stands in `StepTrees`.

    Attributes:
        batch: vLLM's, B requests.
        logits: `[rows, V]` of the step's nodes and mask rows, where one pass gave both; None otherwise.
    """

    batch: InputBatch
    logits: torch.Tensor | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether any request had a block."""
        return self.batch.num_draft_tokens > 0

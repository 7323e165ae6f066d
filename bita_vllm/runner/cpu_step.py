"""What the CPU runner knows of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bita_vllm.step.host import StepBlocks, Walk

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.worker.gpu_input_batch import InputBatch


@dataclass
class CPUStep:
    """One step, from its inputs to the next blocks.

    Attributes:
        batch: vLLM's, B requests. When the next blocks are made, `token_ids_cpu` and `num_tokens_no_spec` have the
            tokens of each, this step's included.
        blocks: which row is what; None in a step that is plain vLLM's to its end.
        grammar: bitmasks of the blocks' nodes, if a request with a block has a grammar.
        mask_logits: `[mask rows, V]`, where one pass gave the nodes' and theirs; None otherwise.
        walk: where the walks went, when they have been walked.
    """

    batch: InputBatch
    blocks: StepBlocks | None = None
    grammar: GrammarOutput | None = None
    mask_logits: torch.Tensor | None = None
    walk: Walk | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether any request has a block."""
        return self.blocks is not None and bool((self.blocks.line >= 0).any())

"""Grammar bitmasks on node rows, by vLLM's own worker-side kernel.

Source: vllm/v1/worker/gpu/structured_outputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from types import SimpleNamespace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from bita_vllm.step.device import StepTrees
from bita_vllm.tree import Template


class NodeGrammar:
    """vLLM's StructuredOutputsWorker on logits that have N rows for each request, one a node."""

    def __init__(
        self,
        worker: StructuredOutputsWorker,
        # that blocks of requests with a grammar are made from
        templates: Sequence[Template],
        max_num_reqs: int,
    ) -> None:
        self._worker = copy(worker)  # shares the buffers
        # As many rows as BlockGrammar makes. Trees that others may take can have more nodes.
        self._rows_each = max(template.num_nodes for template in templates)
        self._worker.mask_stride = self._rows_each
        self._counting = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=worker.device)

    def warm_up(self, vocab_size: int, dtype: torch.dtype) -> None:
        """Launch vLLM's kernel once: its own warm-up compiles it for another number of rows a request."""
        logits = torch.zeros(self._rows_each, vocab_size, dtype=dtype, device=self._counting.device)
        words = self._worker.grammar_bitmask.shape[1]
        masks = np.full((self._rows_each, words), -1, dtype=np.int32)
        self._apply(logits, ["warm-up"], ["warm-up"], masks)

    def constrain(
        self,
        # [requests of the part * N, V], changed in place
        logits: torch.Tensor,
        part: slice,
        input_batch: InputBatch,
        grammar: GrammarOutput,
        trees: StepTrees,
    ) -> None:
        """Forbid at every node what its grammar forbids there.

        Where the scheduler did not know a request's drafts, there is no bitmask after its root's: the
        walk stops there, as vLLM then rejects all drafts (`grammar_invalid_drafts`).
        """
        request_ids = input_batch.req_ids[part]
        order = {request_id: index for index, request_id in enumerate(request_ids)}
        ids = grammar.structured_output_request_ids
        inside = [index for index, request_id in enumerate(ids) if request_id in order]
        if not inside:
            return
        masks = grammar.grammar_bitmask.reshape(len(ids), self._rows_each, -1)[inside]
        chosen = [ids[index] for index in inside]
        self._apply(logits, request_ids, chosen, masks.reshape(-1, masks.shape[2]))
        acceptable = grammar.num_acceptable_drafts or [0] * len(ids)
        unknown = [part.start + order[ids[index]] for index in inside if not acceptable[index]]
        if unknown:
            rows = trees.num_rows
            rows.index_fill_(0, async_tensor_h2d(np.array(unknown), device=rows.device), 1)

    def _apply(
        self,
        # [requests * N, V], changed in place
        logits: torch.Tensor,
        request_ids: list[str],
        chosen: list[str],
        # [chosen requests * rows each, V / 32] int32
        masks: np.ndarray,
    ) -> None:
        layout = SimpleNamespace(
            req_ids=request_ids,
            cu_num_logits=self._counting[: len(request_ids) + 1]
            * (len(logits) // len(request_ids)),
            cu_num_logits_np=None,
            num_draft_tokens_per_req=np.full(len(request_ids), self._rows_each - 1),
        )
        self._worker.apply_grammar_bitmask(logits, layout, chosen, masks)

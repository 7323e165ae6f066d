"""Grammar bitmasks on node rows, by vLLM's own worker-side kernel.

Source: vllm/v1/worker/gpu/structured_outputs.py.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from bita_vllm.runner.gpu_trees import StepTrees


class NodeGrammar:
    """vLLM's StructuredOutputsWorker on logits that have N rows for each request, one a node."""

    def __init__(self, worker: StructuredOutputsWorker, max_nodes: int, max_num_reqs: int) -> None:
        self._worker = copy(worker)  # shares the buffers
        self._worker.mask_stride = self._rows_each = max_nodes  # rows that BlockGrammar makes
        self._counting = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=worker.device)

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

        Where the scheduler did not know a request's drafts, there is no bitmask behind its root: the
        walk stops there, as vLLM then rejects all drafts (`grammar_invalid_drafts`).
        """
        request_ids = input_batch.req_ids[part]
        order = {request_id: index for index, request_id in enumerate(request_ids)}
        ids = grammar.structured_output_request_ids
        inside = [index for index, request_id in enumerate(ids) if request_id in order]
        if not inside:
            return
        masks = grammar.grammar_bitmask.reshape(len(ids), self._rows_each, -1)[inside]
        num_nodes = len(logits) // len(request_ids)
        layout = SimpleNamespace(
            req_ids=request_ids,
            cu_num_logits=self._counting[: len(request_ids) + 1] * num_nodes,
            cu_num_logits_np=None,
            num_draft_tokens_per_req=np.full(len(request_ids), self._rows_each - 1),
        )
        chosen = [ids[index] for index in inside]
        self._worker.apply_grammar_bitmask(
            logits, layout, chosen, masks.reshape(-1, masks.shape[2])
        )
        acceptable = grammar.num_acceptable_drafts or [0] * len(ids)
        unknown = [part.start + order[ids[index]] for index in inside if not acceptable[index]]
        if unknown:
            rows = trees.num_rows
            rows.index_fill_(0, async_tensor_h2d(np.array(unknown), device=rows.device), 1)

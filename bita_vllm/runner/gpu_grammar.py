"""Grammar bitmasks on node rows, by vLLM's own worker-side kernel, and the drafts that the scheduler needs for them.

Source: vllm/v1/worker/gpu/{structured_outputs,spec_decode/utils}.py.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from bita_vllm.step.block_drafts import BlockDrafts
from bita_vllm.step.device import StepTrees


class NodeGrammar:
    """vLLM's StructuredOutputsWorker on logits that have N rows for each request, one a node."""

    def __init__(
        self,
        worker: StructuredOutputsWorker,
        # rows that BlockGrammar makes for a request: the most nodes of any tree
        rows_each: int,
        max_num_reqs: int,
    ) -> None:
        self._worker = copy(worker)  # shares the buffers
        self._rows_each = self._worker.mask_stride = rows_each
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


class BlockDraftsHandler(DraftTokensHandler):
    """vLLM's copy of the drafts to the host, which it makes where a grammar follows them; lines travel in it."""

    def __init__(
        self,
        device: torch.device,
        # [max_num_reqs] int32, line of the next block of the request in each slot
        line_of_slot: torch.Tensor,
    ) -> None:
        super().__init__(device)
        self._line_of_slot = line_of_slot

    def set_draft_tokens(
        self,
        input_batch: InputBatch,
        # [B, width] int64
        draft_tokens: torch.Tensor,
    ) -> None:
        """Stock, with each block's line in one more column."""
        if input_batch.has_structured_output_reqs:
            lines = self._line_of_slot[input_batch.idx_mapping, None].to(draft_tokens.dtype)
            draft_tokens = torch.cat([draft_tokens, lines], dim=1)
        super().set_draft_tokens(input_batch, draft_tokens)

    def get_draft_tokens(self) -> DraftTokenIds | None:
        """Stock; drafts that were not copied have no lines, as nobody looks at them."""
        drafts = super().get_draft_tokens()
        if drafts is None or self.draft_tokens_np is None:
            return drafts
        lines = [tokens.pop() for tokens in drafts.draft_token_ids]
        return BlockDrafts(drafts.req_ids, drafts.draft_token_ids, lines)

"""The trees of one step on the device: which rows are whose, the walk's results, the next lines.

Persistent buffers: a CUDA graph reads `line` at replay, whatever request sits where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from bita_kernels.accept_tree import accept_tree
from bita_kernels.tree_table import TreeTable
from vllm.v1.worker.gpu.input_batch import InputBatch

from bita_vllm.line_choice import LineChoice, probabilities_of
from bita_vllm.runner.mask_lora import MaskRows
from bita_vllm.template_set import TemplateSet, templates_of
from bita_vllm.tree import TemplateTable


class StepTrees:
    """B requests of a step in batch order; slots are vLLM's places of requests between steps.

    Attributes:
        table: the lines of all templates, set after set.
        choice: which of a set's lines a block takes.
        line_of_slot: `[max_num_reqs]` int32, line of the next block of the request in each slot.
        line: `[max_num_reqs]` int32, line of each request's block, -1 without one and behind B.
        first_row: `[max_num_reqs]` int32, the root's row in the step; without a block the last row.
        num_rows: `[max_num_reqs]` int32, rows of the request in the step.
        context_len: `[max_num_reqs]` int32, committed tokens before `first_row`.
        tokens, path, num_emitted, last_node, next_depths, mask_rows: outputs of `accept_tree`.
        block_tables: one `[B or more, max blocks]` int32 for each KV cache group.
        lora_rows: the mask rows of the step, for the adapter's low-rank deltas; None without deltas.
    """

    lora_rows: MaskRows | None = None

    def __init__(
        self,
        sets: Sequence[TemplateSet],
        # [ages, 2, k, ranks] the adapter's
        acceptance: np.ndarray,
        max_num_reqs: int,
        device: torch.device,
    ) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

        lines = TemplateTable(*templates_of(sets))
        self.table = table = TreeTable.of(lines, device)
        self.choice = LineChoice(sets, acceptance, device)
        # by the number of draft tokens, as vLLM counts a width
        self._sets = {one.first.num_rows - 1: (i, one) for i, one in enumerate(sets)}
        self.line_of_slot, self.line = buffer(), buffer()
        self.first_row, self.num_rows, self.context_len = buffer(), buffer(), buffer()
        self.tokens = buffer(table.max_depth + 1, dtype=torch.int64)
        self.path = buffer(table.max_depth + 1)
        self.num_emitted, self.last_node, self.next_depths = buffer(), buffer(), buffer()
        self.mask_rows = buffer(table.max_depth)
        self.block_tables: tuple[torch.Tensor, ...] = ()
        # most nodes of the templates that each slot's next block is made from; known on the host
        self._nodes_of_slot_np = np.ones(max_num_reqs, dtype=np.int64)
        self._emitting = torch.ones(max_num_reqs, dtype=torch.bool, device=device)
        self._requests = torch.arange(max_num_reqs, dtype=torch.int32, device=device)
        self._places = torch.arange(table.num_rows, device=device)
        self._depths = torch.arange(table.max_depth, dtype=torch.int32, device=device)

    def begin(self, input_batch: InputBatch, block_tables: tuple[torch.Tensor, ...]) -> None:
        """Find the blocks of a step, and make its positions follow the trees.

        A request has a block if drafts are scheduled for it; the block may be cut.
        """
        n = input_batch.num_reqs
        starts, ends = input_batch.query_start_loc[:n], input_batch.query_start_loc[1 : n + 1]
        num_logits = input_batch.cu_num_logits[1 : n + 1] - input_batch.cu_num_logits[:n]
        has_block = num_logits > 1
        self.block_tables = block_tables
        self.line.fill_(-1)
        self.line[:n] = torch.where(has_block, self.line_of_slot[input_batch.idx_mapping], -1)
        self.num_rows[:n] = ends - starts
        self.first_row[:n] = torch.where(has_block, starts, ends - 1)
        self.context_len[:n] = input_batch.positions[self.first_row[:n].long()]
        if input_batch.num_draft_tokens:
            longest = min(int(input_batch.num_scheduled_tokens.max()), self.table.num_rows)
            self._shift_positions(input_batch.positions, n, self._places[:longest])
            if self.lora_rows is not None:
                self._find_mask_rows(self.lora_rows)
        elif self.lora_rows is not None:
            self.lora_rows.num.zero_()

    def _shift_positions(
        self,
        # [rows] int64, position = KV slot
        positions: torch.Tensor,
        n: int,
        # [rows of the longest block] int64, 0, 1, ...
        places: torch.Tensor,
    ) -> None:
        """Position = committed tokens + depth: in place, for the rows of blocks."""
        inside = (self.line[:n] >= 0)[:, None] & (places < self.num_rows[:n, None])
        depth = self.table.depth[self.line[:n].clamp(min=0).long(), : len(places)]
        rows = torch.where(inside, self.first_row[:n, None] + places, 0)
        shift = torch.where(inside, depth - places, 0)
        positions.index_add_(0, rows.flatten(), shift.flatten())

    def nodes_each(self, input_batch: InputBatch) -> int:
        """N: nodes of the largest template that a block of the step is made from."""
        has_block = input_batch.num_draft_tokens_per_req > 0
        return int(self._nodes_of_slot_np[input_batch.idx_mapping_np[has_block]].max())

    def node_rows(self, part: slice, num_nodes: int) -> torch.Tensor:
        """`[requests of the part, N]` int64, rows of the step that hold nodes; a request's last one is repeated."""
        own = torch.where(self.line[part] >= 0, self.num_rows[part], 1)
        places = torch.minimum(self._places[:num_nodes], own[:, None] - 1)
        return self.first_row[part, None].long() + places

    def _find_mask_rows(self, found: MaskRows) -> None:
        """Rows that hold masks, ascending and without gaps."""
        line = self.line.clamp(min=0).long()
        inside = (self.line >= 0)[:, None] & (self.table.mask_index[line] >= 0)
        inside &= self._places < self.num_rows[:, None]
        count = inside.flatten().cumsum(0)
        # All others go to the last place, which is never in use.
        place = torch.where(inside.flatten(), count - 1, len(found.rows) - 1)
        rows = self.first_row[:, None] + self._places
        found.rows.scatter_(0, place, rows.flatten())
        found.num.copy_(count[-1:])

    def walk(
        self,
        # [requests of the part * N] int64
        targets: torch.Tensor,
        part: slice,
        input_batch: InputBatch,
    ) -> None:
        """Walk every tree along its targets, into this object's buffers."""
        n = part.stop - part.start
        accept_tree(
            targets,
            input_batch.input_ids,
            self._requests[:n] * (len(targets) // n),
            self.first_row[part],
            self.num_rows[part],
            self.line[part],
            self._emitting[part],
            self.table,
            self.tokens[part],
            self.path[part],
            self.num_emitted[part],
            self.last_node[part],
            self.next_depths[part],
            self.mask_rows[part],
        )

    def no_candidates(self, n: int) -> None:
        """As `walk`, in a step without blocks: every next block is line 0."""
        self.next_depths[:n] = 0

    def choose_lines(
        self,
        part: slice,
        width: int,
        # [requests of the part * depths, V], of `candidate_rows`
        logits: torch.Tensor,
        only_first: bool,
    ) -> torch.Tensor:
        """`[requests of the part]` int32, lines of the next blocks, of a template with `width` draft tokens."""
        index, templates = self._sets[width]
        depths = self.next_depths[part].clamp(max=templates.max_depth)
        probabilities = logits[:, : templates.max_rank]
        only_first = only_first or not templates.has_choice
        if not only_first:
            top = logits.topk(templates.max_rank, dim=-1).values
            probabilities = probabilities_of(top, logits)
        by_depth = probabilities.unflatten(0, (-1, templates.max_depth))
        return self.choice(index, depths, by_depth, only_first).int()

    def keep_lines(
        self,
        input_batch: InputBatch,
        # [B] int32
        line: torch.Tensor,
        width: int,
    ) -> None:
        """Remember the next blocks by slot."""
        self.line_of_slot[input_batch.idx_mapping] = line
        most = max(template.num_nodes for template in self._sets[width][1].templates)
        self._nodes_of_slot_np[input_batch.idx_mapping_np] = most

    def candidate_rows(self, part: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the step whose logits give candidates, and where each request finds them.

        `[requests of the part * depths]` int64, and `[requests of the part, max_depth]` int32: which of
        those rows predicts depth d+1.
        """
        depths = self._sets[width][1].max_depth
        rows = self.mask_rows[part, :depths].flatten().clamp(min=0).long()
        first = self._requests[: part.stop - part.start, None] * depths
        return rows, first + self._depths

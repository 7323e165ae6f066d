"""The trees of one step on the device: which rows are whose, the walk's results, the next lines.

Persistent buffers: a CUDA graph reads `line` at replay, whatever request sits where.
"""

from __future__ import annotations

import torch
from bita_kernels.accept_tree import accept_tree
from bita_kernels.tree_table import TreeTable
from vllm.v1.worker.gpu.input_batch import InputBatch

from bita_vllm.runner.mask_lora import MaskRows


class StepTrees:
    """B requests of a step in batch order; slots are vLLM's places of requests between steps.

    Attributes:
        table: the template table.
        line_of_slot: `[max_num_reqs]` int32, line of the next block of the request in each slot.
        line: `[max_num_reqs]` int32, line of each request's block, -1 without one and behind B.
        first_row: `[max_num_reqs]` int32, the root's row in the step; without a block the last row.
        num_rows: `[max_num_reqs]` int32, rows of the request in the step.
        context_len: `[max_num_reqs]` int32, committed tokens before `first_row`.
        tokens, path, num_emitted, last_node, next_line, mask_rows: outputs of `accept_tree`.
        logits_rows: `[max_num_reqs, max_depth]` int32, row of each of `mask_rows` among their logits.
        block_tables: one `[B or more, max blocks]` int32 for each KV cache group.
        lora_rows: the mask rows of the step, for the adapter's low-rank deltas; None without deltas.
    """

    lora_rows: MaskRows | None = None

    def __init__(self, table: TreeTable, max_num_reqs: int, device: torch.device) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

        self.table = table
        self.line_of_slot, self.line = buffer(), buffer()
        self.first_row, self.num_rows, self.context_len = buffer(), buffer(), buffer()
        self.tokens = buffer(table.max_depth + 1, dtype=torch.int64)
        self.path = buffer(table.max_depth + 1)
        self.num_emitted, self.last_node, self.next_line = buffer(), buffer(), buffer()
        self.mask_rows = buffer(table.max_depth)
        self.emitting = torch.ones(max_num_reqs, dtype=torch.bool, device=device)
        self.first_target = (
            torch.arange(max_num_reqs, dtype=torch.int32, device=device) * table.max_nodes
        )
        num_logits = max_num_reqs * table.max_depth
        self.logits_rows = torch.arange(num_logits, dtype=torch.int32, device=device).view(
            max_num_reqs, table.max_depth
        )
        self.block_tables: tuple[torch.Tensor, ...] = ()
        self._nodes = torch.arange(table.max_nodes, device=device)
        self._places = torch.arange(table.num_rows, device=device)

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
            self._shift_positions(input_batch.positions, n)
            if self.lora_rows is not None:
                self._find_mask_rows(self.lora_rows)
        elif self.lora_rows is not None:
            self.lora_rows.num.zero_()

    def _shift_positions(
        self,
        # [rows] int64, position = KV slot
        positions: torch.Tensor,
        n: int,
    ) -> None:
        """Position = committed tokens + depth: in place, for the rows of blocks."""
        inside = (self.line[:n] >= 0)[:, None] & (self._places < self.num_rows[:n, None])
        depth = self.table.depth[self.line[:n].clamp(min=0).long()]
        rows = torch.where(inside, self.first_row[:n, None] + self._places, 0)
        shift = torch.where(inside, depth - self._places, 0)
        positions.index_add_(0, rows.flatten(), shift.flatten())

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

    def node_rows(self, n: int) -> torch.Tensor:
        """`[n, max_nodes]` int64, rows of the step that hold nodes; a request's last one is repeated."""
        own = torch.where(self.line[:n] >= 0, self.num_rows[:n], 1)
        places = torch.minimum(self._nodes, own[:, None] - 1)
        return self.first_row[:n, None].long() + places

    def walk(
        self,
        # [n * max_nodes] int64
        targets: torch.Tensor,
        input_batch: InputBatch,
    ) -> None:
        """Walk every tree along its targets, into this object's buffers."""
        n = input_batch.num_reqs
        accept_tree(
            targets,
            input_batch.input_ids,
            self.first_target[:n],
            self.first_row[:n],
            self.num_rows[:n],
            self.line[:n],
            self.emitting[:n],
            self.table,
            self.tokens[:n],
            self.path[:n],
            self.num_emitted[:n],
            self.last_node[:n],
            self.next_line[:n],
            self.mask_rows[:n],
        )

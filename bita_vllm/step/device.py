"""The trees of one step on the device: which rows are whose, the walk's results, the next lines.

Persistent buffers: a CUDA graph reads `line` at replay, whatever request sits where.
"""

from __future__ import annotations

import numpy as np
import torch
from bita_kernels.accept_tree import accept_tree
from bita_kernels.begin_step import begin_step
from bita_kernels.choice_table import ChoiceTable
from bita_kernels.tree_table import TreeTable
from vllm.v1.worker.gpu.input_batch import InputBatch

from bita_vllm.step.mask_rows import MaskRows
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import TemplateSet


class StepTrees:
    """B requests of a step in batch order; slots are vLLM's places of requests between steps.

    Attributes:
        table: the lines of all templates, set after set.
        choice: which of a set's lines a block takes.
        most_nodes, most_masks: of any template; together more than R where they are of two.
        line_of_slot: `[max_num_reqs]` int32, line of the next block of the request in each slot.
        line: `[max_num_reqs]` int32, line of each request's block, -1 without one and after B.
        first_row, num_rows, context_len, first_mask, logits_rows, node_tokens, node_positions, node_slots: outputs of
            `begin_step`, in steps with blocks.
        num_nodes: N, nodes of each request of the step that get logits.
        num_masks: mask rows of each request that get logits together with the nodes; 0 where those are too many
            rows, and the chosen mask rows get theirs after the walk.
        path, next_depths, mask_rows: outputs of `accept_tree`.
        block_tables: one `[B or more, max blocks]` int32 for each KV cache group.
        lora_rows: the mask rows of the step, for the adapter's low-rank deltas; None without deltas.
        rows_in_one_pass: most rows that get logits at once for nodes and mask rows together.
    """

    def __init__(
        self,
        ladder: Ladder,
        # [ages, 2, k, ranks] the adapter's
        acceptance: np.ndarray,
        max_num_reqs: int,
        device: torch.device,
        lora_rows: MaskRows | None = None,
        rows_in_one_pass: int = 0,
    ) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

        self.lora_rows, self.rows_in_one_pass = lora_rows, rows_in_one_pass
        self.table = table = TreeTable.of(ladder.table, device)
        choice = LineChoice(ladder, acceptance, torch.device("cpu"))
        self.choice = ChoiceTable.of(choice, table.num_ranks, device)
        self._set_of_width = {width: i for i, width in enumerate(ladder.widths)}
        # [sets, 2] most nodes, and most mask rows, of a set's templates
        self._sizes = np.array([_most_nodes_and_masks(one) for one in ladder.template_sets])
        self.nodes_of_sets: list[int] = self._sizes[:, 0].tolist()
        self.most_nodes, self.most_masks = self._sizes.max(axis=0).tolist()
        self.line_of_slot = buffer()
        self.line = buffer().fill_(-1)
        self.first_row, self.num_rows, self.context_len = buffer(), buffer(), buffer()
        self.first_mask = buffer()
        self.logits_rows = buffer(self.most_nodes + self.most_masks, dtype=torch.int64).flatten()
        self.node_tokens = buffer(self.most_nodes).flatten()
        self.node_positions = buffer(self.most_nodes, dtype=torch.int64).flatten()
        self.node_slots = buffer(self.most_nodes, dtype=torch.int64).flatten()
        self.path = buffer(table.max_depth + 1)
        self.next_depths = buffer()
        self.mask_rows = buffer(table.max_depth, dtype=torch.int64)
        self.block_tables: tuple[torch.Tensor, ...] = ()
        self.num_nodes, self.num_masks = 1, 0
        self._has_blocks = False
        # [max_num_reqs, 2] sizes of the set that each slot's next block is made from; known on the host. In a slot that
        # never had one that is line 0, of the first set: vLLM may pad a request's first step with drafts.
        self._sizes_of_slot_np = np.tile(self._sizes[0], (max_num_reqs, 1))
        self._emitting = torch.ones(max_num_reqs, dtype=torch.bool, device=device)
        requests = torch.arange(max_num_reqs, device=device)
        # [sets, max_num_reqs] int32, a request's first target, where its block is of that set
        nodes = torch.tensor(self._sizes[:, 0].copy(), device=device)
        self._first_targets = (nodes[:, None] * requests).int()
        # [sets, max_num_reqs, mask_depth] int64, where the rows of `candidate_rows` get their logits
        depths = torch.tensor(choice.mask_depths, device=device)[:, None, None]
        self._candidate_places = depths * requests[:, None] + torch.arange(
            self.choice.mask_depth, device=device
        )

    def begin(self, input_batch: InputBatch, block_tables: tuple[torch.Tensor, ...]) -> None:
        """Find the blocks of a step, and make its positions follow the trees.

        A request has a block if drafts are scheduled for it; the block may be cut. A step without blocks launches
        nothing, unless the one before had some.
        """
        self.block_tables = block_tables
        had_blocks, self._has_blocks = self._has_blocks, input_batch.num_draft_tokens > 0
        if not self._has_blocks:
            if had_blocks:
                self.line.fill_(-1)
                if self.lora_rows is not None:
                    self.lora_rows.num.zero_()
            return
        n = input_batch.num_reqs
        has_block = input_batch.num_draft_tokens_per_req > 0
        sizes = self._sizes_of_slot_np[input_batch.idx_mapping_np[has_block]]
        self.num_nodes, self.num_masks = sizes.max(axis=0).tolist()
        if n * (self.num_nodes + self.num_masks) > self.rows_in_one_pass:
            self.num_masks = 0
        lora_rows = self.lora_rows
        begin_step(
            input_batch.query_start_loc[: n + 1],
            input_batch.cu_num_logits[: n + 1],
            input_batch.idx_mapping,
            self.line_of_slot,
            input_batch.input_ids,
            input_batch.positions,
            self.table,
            self.num_nodes,
            self.num_masks,
            self.line,
            self.first_row,
            self.num_rows,
            self.context_len,
            self.first_mask,
            self.logits_rows,
            self.node_tokens,
            self.node_positions,
            self.node_slots,
            None if lora_rows is None else lora_rows.rows,
            None if lora_rows is None else lora_rows.num,
        )

    @property
    def steps(self) -> int:
        """The most that a walk of the step may have: no more than its nodes, and one a depth."""
        return min(self.num_nodes, self.table.max_depth + 1)

    def nodes_of(self, part: slice) -> slice:
        """Where the nodes of some requests lie: N to each."""
        return slice(part.start * self.num_nodes, part.stop * self.num_nodes)

    def rows_of(self, part: slice) -> torch.Tensor:
        """Rows of the step that get logits now: nodes of some requests, or of all, and then all their mask rows."""
        if self.num_masks:
            return self.logits_rows[: part.stop * (self.num_nodes + self.num_masks)]
        return self.logits_rows[self.nodes_of(part)]

    def walk(
        self,
        # [requests of the part * N] int64
        targets: torch.Tensor,
        part: slice,
        input_batch: InputBatch,
        # outputs, as `accept_tree` describes them: [B, max_depth + 3] int64
        tokens: torch.Tensor,
        # [B] int32
        num_emitted: torch.Tensor,
    ) -> None:
        """Walk every tree along its targets."""
        index = self.nodes_of_sets.index(self.num_nodes)
        accept_tree(
            targets,
            input_batch.input_ids,
            self._first_targets[index, : part.stop - part.start],
            self.first_row[part],
            self.num_rows[part],
            self.line[part],
            self._emitting[part],
            self.first_mask[part],
            self.table,
            tokens[part],
            self.path[part],
            num_emitted[part],
            self.next_depths[part],
            self.mask_rows[part],
        )

    def set_of(self, width: int) -> int:
        """The set whose trees have that many draft tokens."""
        return self._set_of_width[width]

    def candidate_rows(self, part: slice, set_index: int) -> torch.Tensor:
        """`[requests of the part, depths of the set]` int64, rows of the step whose logits give candidates, or -1.

        Where nodes and mask rows got their logits in two passes.
        """
        return self.mask_rows[part, : self.choice.mask_depths[set_index]]

    def candidate_places(self, part: slice, set_index: int) -> torch.Tensor:
        """`[requests of the part, mask_depth]` int64, where logits of `candidate_rows` lie, row by row."""
        return self._candidate_places[set_index, : part.stop - part.start]

    def expect_blocks(self, input_batch: InputBatch, set_index: int) -> None:
        """Remember which set the next blocks of these requests are of."""
        self._sizes_of_slot_np[input_batch.idx_mapping_np] = self._sizes[set_index]


def _most_nodes_and_masks(templates: TemplateSet) -> tuple[int, int]:
    """Over the templates of a set."""
    nodes = [template.num_nodes for template in templates.templates]
    masks = [template.num_rows - template.num_nodes for template in templates.templates]
    return max(nodes), max(masks)

"""Structured output with step blocks: a bitmask for every node, from the grammar's state along its path.

vLLM's manager advances a request's grammar along a chain of drafts and rolls it back. A tree is a set of
chains, one from its root to each leaf. The manager is asked for each of them, so that it decides about
termination and the end of reasoning inside a draft. Mask ids never reach it.
Source: vllm/v1/structured_output/__init__.py, Scheduler.get_grammar_bitmask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from bita_vllm.step.block_drafts import BlockDrafts
from bita_vllm.tree import TemplateTable

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager


class BlockGrammar:
    """The scheduler's StructuredOutputManager: it answers for blocks, and passes all other calls on to vLLM's."""

    def __init__(self, manager: StructuredOutputManager, table: TemplateTable) -> None:
        self._manager, self._table = manager, table
        self._lines: dict[str, int] = {}
        # a request's drafts before the scheduler cuts them, and the parent row of each node
        self._blocks: WeakKeyDictionary[Request, tuple[list[int], np.ndarray]] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def take_lines(self, drafts: DraftTokenIds) -> None:
        """Remember which blocks these drafts fill; the scheduler hands them to `validate_tokens` next."""
        lines = drafts.lines if isinstance(drafts, BlockDrafts) else []
        self._lines = dict(zip(drafts.req_ids, lines, strict=False))

    def validate_tokens(self, request: Request, tokens: list[int]) -> list[int]:
        """Return the drafts unchanged if the shape of their tree is known, else none of them."""
        if not request.use_structured_output:
            return tokens
        line = self._lines.get(request.request_id)
        if line is None or not tokens:
            return []
        self._blocks[request] = (
            list(tokens),
            self._table.parent[line, : self._table.num_nodes[line]],
        )
        return tokens

    def grammar_bitmask(
        self,
        requests: dict[str, Request],
        request_ids: list[str],
        scheduled: dict[str, list[int]],
    ) -> np.ndarray | None:
        """`[requests * N, V / 32]` int32, N nodes each, all ones where no walk comes; vLLM's own without blocks.

        `scheduled` holds the step's drafts by request, less what was cut from them, or -1s where the
        scheduler does not know them: then there is a bitmask for the root only.
        """
        if not scheduled or not request_ids:
            return self._manager.grammar_bitmask(requests, request_ids, scheduled)
        masks: np.ndarray | None = None
        for index, request_id in enumerate(request_ids):
            request, tokens = requests[request_id], scheduled.get(request_id, [])
            for path in self._paths(request, tokens):
                chain = {request_id: [tokens[row - 1] for row in path]}
                filled = self._manager.grammar_bitmask(requests, [request_id], chain)
                assert filled is not None
                if masks is None:
                    rows = len(request_ids) * self._table.max_nodes
                    masks = np.full((rows, filled.shape[1]), -1, dtype=np.int32)
                first = index * self._table.max_nodes
                masks[[first, *(first + row for row in path)]] = filled[: len(path) + 1]
        return masks

    def _paths(self, request: Request, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the longest paths from the root that the grammar accepts, as node rows without the root."""
        whole, parents = self._blocks.get(request, ([], np.zeros(0, dtype=np.int32)))
        if not tokens or tokens != whole[: len(tokens)]:
            return [()]
        nodes = range(1, min(len(parents), len(tokens) + 1))
        inner = {int(parents[row]) for row in nodes}
        accepted: set[tuple[int, ...]] = {()}
        for leaf in nodes:
            if leaf in inner:
                continue
            path = [leaf]
            while parents[path[0]] > 0:
                path.insert(0, int(parents[path[0]]))
            valid = self._manager.validate_tokens(request, [tokens[row - 1] for row in path])
            accepted.add(tuple(path[: len(valid)]))
        return [
            path
            for path in accepted
            if not any(path == other[: len(path)] for other in accepted if other != path)
        ]

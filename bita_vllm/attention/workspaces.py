"""Workspaces of tree attention, shared by the layers of a model."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.tree_attention import Workspace, num_processors

# Programs that keep a streaming multiprocessor busy without splits.
PROGRAMS_PER_PROCESSOR = 2
MAX_WORKSPACE_BYTES = 2**28


class AttentionShape(Protocol):
    """What of an attention layer a workspace depends on: of this rank, as vLLM's implementations name it."""

    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    config: AttentionConfig


class SharedWorkspaces:
    """One workspace for all layers of an attention shape; layers run one after the other.

    Big enough for as many requests as it takes to fill the machine without splits, and not bigger than
    MAX_WORKSPACE_BYTES.
    """

    def __init__(
        self, num_rows: int, max_num_reqs: int, max_seq_len: int, device: torch.device
    ) -> None:
        self._num_rows, self._max_num_reqs, self._device = num_rows, max_num_reqs, device
        self._max_seq_len = max_seq_len
        self._made: dict[tuple[int, int, int, AttentionConfig], Workspace | None] = {}

    def of(self, impl: AttentionShape) -> Workspace | None:
        """Return the one for a layer, or None where its longest sequence is one split."""
        key = (impl.num_heads, impl.num_kv_heads, impl.head_size, impl.config)
        if key not in self._made:
            self._made[key] = self._make(impl)
        return self._made[key]

    def _make(self, impl: AttentionShape) -> Workspace | None:
        if impl.config.num_splits(self._max_seq_len) == 1:
            return None
        num_requests = self.num_requests(impl)
        if num_requests == 0:
            return None
        return Workspace.empty(
            impl.config,
            num_requests,
            self._num_rows,
            impl.num_heads,
            impl.head_size,
            self._max_seq_len,
            self._device,
        )

    def num_requests(self, impl: AttentionShape) -> int:
        """Return how many requests have their splits side by side."""
        processors = num_processors(self._device)
        fit = side_by_side_requests(impl, self._num_rows, self._max_seq_len, processors)
        return min(self._max_num_reqs, fit)


def side_by_side_requests(
    shape: AttentionShape, num_rows: int, max_seq_len: int, processors: int
) -> int:
    """Return for how many requests splits run side by side: until the machine is full, as far as memory goes."""
    config = shape.config
    tiles = triton.cdiv(num_rows * shape.num_queries_per_kv, config.block_m)
    programs = tiles * shape.num_kv_heads  # of a request, without splits
    rows = config.num_parts(max_seq_len) * num_rows
    request_bytes = rows * shape.num_heads * (shape.head_size + 2) * 4
    return min(
        triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs),
        MAX_WORKSPACE_BYTES // request_bytes,
    )

"""vLLM's scheduler with speculative statistics in tree depths.

To the scheduler a step block is R-1 draft tokens; to a user a draft is as long as the tree is deep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from bita_vllm.config import get_settings
from bita_vllm.tree import TemplateTable


class _DepthStatistics(Scheduler):
    """Stock scheduling; `vllm:spec_decode_*` counts depths offered and depths accepted, never rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = get_settings(self.vllm_config)
        assert settings is not None
        self._max_depth = settings.template.max_depth
        self._depth_offered = depth_offered(TemplateTable(settings.template))

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> SpecDecodingStats | None:
        if self.log_stats and spec_decoding_stats is None:
            spec_decoding_stats = SpecDecodingStats.new(self.num_spec_tokens)
        depth = int(self._depth_offered[num_draft_tokens])
        stats = super().make_spec_decoding_stats(spec_decoding_stats, depth, *args, **kwargs)
        return stats or spec_decoding_stats


class BitaScheduler(_DepthStatistics):
    """Each step is scheduled after the last one."""


class BitaAsyncScheduler(_DepthStatistics, AsyncScheduler):
    """The next step is scheduled while a step runs."""


def depth_offered(table: TemplateTable) -> np.ndarray:
    """`[R]` int: deepest draft node of a block with that many rows behind its root.

    Blocks of the table have their own depth; other lengths are the full block, cut by the scheduler.
    """
    full = table.depth[-1, : table.num_nodes[-1]]
    offered = np.array([full[: rows + 1].max() for rows in range(table.template.num_rows)])
    offered[table.num_rows - 1] = np.arange(len(table.num_rows))
    return offered

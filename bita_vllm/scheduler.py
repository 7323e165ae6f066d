"""vLLM's scheduler with speculative statistics in tree depths, and with widths that follow the load.

To the scheduler a step block is R-1 draft tokens; to a user a draft is as long as the tree is deep.
Source: Scheduler.schedule, update_from_output, update_draft_token_ids, make_spec_decoding_stats
(vllm/v1/core/sched/scheduler.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from bita_vllm import config
from bita_vllm.config import get_settings
from bita_vllm.grammar import BlockGrammar
from bita_vllm.tree import TemplateTable
from bita_vllm.tuning.online import policy_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = init_logger("vllm.bita")


class _BlockScheduler(Scheduler):
    """Stock scheduling; `vllm:spec_decode_*` counts depths offered and depths accepted, never rows.

    Widths are those of the ladder's table, which follows what steps take and what is accepted (tuning/online.py);
    requests whose blocks do not pay go without for a while (tuning/accounts.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = get_settings(self.vllm_config)
        assert settings is not None
        # Requests with a grammar have blocks of first templates only (the runners see to it).
        tables = [TemplateTable(one.first) for one in settings.ladder.template_sets]
        stacked = TemplateTable(*settings.templates)
        self._depth_of_line = depth_of_line(stacked)
        self._depth_offered = depth_offered(TemplateTable(settings.template))
        self._block_lines: dict[str, int] = {}
        manager: Any = self.structured_output_manager  # type: ignore[has-type]
        self.structured_output_manager = BlockGrammar(  # type: ignore[assignment]
            manager, tables, self.vllm_config.model_config.get_vocab_size()
        )
        max_num_seqs = self.scheduler_config.max_num_seqs
        if not config.on_gpu():
            # Not told so by the config, which on the V1 runner may not have it. With a table by batch size
            # stock does not pad requests that come in to R rows, which only CUDA graphs gain from.
            self.dynamic_sd_lookup = settings.ladder.lookup(max_num_seqs).tolist()
        self._policy = policy_of(
            settings.ladder, settings.adapter_dir, max_num_seqs, padded=config.on_gpu()
        )
        self._last_decode = (0, 0.0)  # requests, end of the last step if it did nothing but decode

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        # Blocks are padded (V2 runner), or of several templates: the runner says which lines they had.
        lines = getattr(model_runner_output, "block_lines", None) or []
        self._block_lines = dict(zip(model_runner_output.req_ids, lines, strict=False))
        if self._policy is not None:
            self._follow_the_load(scheduler_output, lines, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _follow_the_load(
        self, step: SchedulerOutput, lines: list[int], output: ModelRunnerOutput
    ) -> None:
        """Tell the policy what the step came to; take its table."""
        policy, now = self._policy, time.monotonic()
        assert policy is not None
        num_requests, drafts = len(step.num_scheduled_tokens), step.scheduled_spec_decode_tokens
        rows_of_blocks = sum(map(len, drafts.values())) + num_requests
        only_decoding = (
            num_requests > 0
            and not step.scheduled_new_reqs
            and step.total_num_scheduled_tokens == rows_of_blocks
        )
        # From the end of a step to the end of the next one is what a step takes, with and without async scheduling.
        requests_before, end_before = self._last_decode
        timed = only_decoding and requests_before == num_requests
        self._last_decode = (num_requests if only_decoding else 0, now)
        last_nodes = getattr(output, "last_nodes", [])
        policy.saw_step(output.req_ids, lines, last_nodes, now - end_before if timed else None)
        if policy.review(now):
            logger.info("bita: rows by load now %s", policy.describe())
        self.dynamic_sd_lookup = policy.lookup

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Stock; requests whose blocks do not pay go without: one row, from which the runner goes on."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id in () if self._policy is None else self._policy.resting:
            if (request := self.requests.get(request_id)) is not None:
                request.spec_token_ids = []

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        if request_id in self._block_lines:
            depth = int(self._depth_of_line[self._block_lines[request_id], num_draft_tokens])
        else:
            depth = int(self._depth_offered[num_draft_tokens])
        if num_invalid_spec_tokens and num_invalid_spec_tokens.get(request_id):
            depth = 0  # the walk stopped at the root (grammar.py)
        stats = super().make_spec_decoding_stats(
            spec_decoding_stats, depth, num_accepted_tokens, None, request_id
        )
        return stats or spec_decoding_stats


class BitaScheduler(_BlockScheduler):
    """Each step is scheduled after the last one."""


class BitaAsyncScheduler(_BlockScheduler, AsyncScheduler):
    """The next step is scheduled while a step runs."""


def depth_offered(table: TemplateTable) -> np.ndarray:
    """`[R]` int: deepest draft node of a block with that many rows behind its root.

    Blocks of the table have their own depth; other lengths are the full block, cut by the scheduler.
    """
    full = table.depth[-1, : table.num_nodes[-1]]
    offered = np.array([full[: rows + 1].max() for rows in range(table.template.num_rows)])
    offered[table.num_rows - 1] = np.arange(len(table.num_rows))
    return offered


def depth_of_line(table: TemplateTable) -> np.ndarray:
    """`[lines, R]` int: deepest draft node of each line, cut to that many rows behind its root."""
    is_node = np.arange(table.depth.shape[1]) < table.num_nodes[:, None]
    return np.maximum.accumulate(np.where(is_node, table.depth, 0), axis=1)

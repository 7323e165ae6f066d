"""vLLM's scheduler with speculative statistics in tree depths, and with widths that follow the load.

To the scheduler a step block is R-1 draft tokens. To a user a draft is as long as the tree is deep.
Source: Scheduler.schedule, add_request, update_from_output, update_draft_token_ids,
update_draft_token_ids_in_output, make_spec_decoding_stats
(vllm/v1/core/sched/scheduler.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from bita_vllm.scheduling.engine_process import end_with_front_end
from bita_vllm.scheduling.grammar import BlockGrammar
from bita_vllm.scheduling.online import policy_of
from bita_vllm.scheduling.token_budget import leave_out_blocks, prefill_tokens, within_budget
from bita_vllm.step.graphs import most_requests
from bita_vllm.step.settings import get_settings
from bita_vllm.system import platform
from bita_vllm.tree import TemplateTable

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.bita")


class _BlockScheduler(Scheduler):
    """Stock scheduling, with draft metrics that count depths offered and depths accepted, never rows.

    Widths come from the ladder's table, which follows the seconds that steps take and the tokens that are accepted
    (online.py). Requests whose blocks do not pay get none for a while (accounts.py). Blocks never take the
    budget of root rows and prefill (token_budget.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = get_settings(self.vllm_config)
        assert settings is not None
        self._depth_of_line = depth_of_line(settings.ladder.table)
        self._depth_offered = depth_offered(TemplateTable(settings.template))
        self._max_depth = settings.max_depth
        manager: Any = self.structured_output_manager  # type: ignore[has-type]
        self._grammar = BlockGrammar(manager, settings.ladder.table)
        self.structured_output_manager = self._grammar  # type: ignore[assignment]
        max_num_seqs = self.scheduler_config.max_num_seqs
        self._widths = settings.ladder.widths
        self._table: list[int] = []  # the last table that was asked for
        # On the V1 runner the config may not have a table. With one, stock does not pad requests that come in
        # to R rows, which only CUDA graphs gain from.
        stock: list[int] | None = self.dynamic_sd_lookup  # type: ignore[has-type]
        if stock is not None or not platform.on_gpu():
            self._use_table(settings.ladder.lookup(max_num_seqs).tolist())
        self._policy = policy_of(
            settings.ladder,
            settings.acceptance,
            max_num_seqs,
            padded=platform.on_gpu(),
            most_requests=most_requests(self.vllm_config) if platform.on_gpu() else None,
        )
        end_with_front_end()
        # Requests, end and CPU clock of the last step if it did nothing but decode.
        self._last_decode: tuple[int, float, float | None] = (0, 0.0, None)

    def add_request(self, request: Request) -> None:
        """Stock; what is counted for one request has a place for each depth."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self._max_depth)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Stock; blocks for which root rows and prefill leave no room stay out of the step."""
        budget, running = self.max_num_scheduled_tokens, self.running
        if any(request.spec_token_ids for request in running):
            free_blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
            num_prefill_tokens = prefill_tokens(
                running,
                self.waiting,
                max(budget - len(running), 0),
                self.max_num_running_reqs - len(running),
                free_blocks * self.block_size,
                self._longest_chunk(),
            )
            leave_out_blocks(running, budget, num_prefill_tokens)
        return super().schedule(throttle_prefills)

    def _longest_chunk(self) -> int:
        """Return the most tokens of one prompt in a step, as vLLM caps them where other requests run."""
        budget, threshold = (
            self.max_num_scheduled_tokens,
            self.scheduler_config.long_prefill_token_threshold,
        )
        # vLLM may raise the cap to a request's fair share.
        return max(threshold, budget // sum(self.get_request_counts())) if threshold else budget

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        # Blocks are padded (V2 runner), or of several templates: the runner says which lines they had.
        lines = getattr(model_runner_output, "block_lines", None) or []
        if self._policy is not None:
            self._follow_the_load(scheduler_output, lines, model_runner_output)
        self._count_depths(
            scheduler_output, dict(zip(model_runner_output.req_ids, lines, strict=False))
        )
        return super().update_from_output(scheduler_output, model_runner_output)

    def _count_depths(self, step: SchedulerOutput, line_of_request: dict[str, int]) -> None:
        """Make the rows of a block that are no depth of it 'invalid drafts': vLLM's counts all leave those out."""
        invalid = step.num_invalid_spec_tokens or {}
        step.num_invalid_spec_tokens = {
            request: num_rows
            if invalid.get(request)  # the walk stopped at the root (grammar.py)
            else num_rows - self._depth(line_of_request.get(request), num_rows)
            for request, num_rows in zip(
                step.scheduled_spec_decode_tokens,
                map(len, step.scheduled_spec_decode_tokens.values()),
                strict=True,
            )
        }

    def _depth(self, line: int | None, num_rows: int) -> int:
        """Deepest draft node among that many rows after the root."""
        if line is None:
            return int(self._depth_offered[num_rows])
        return int(self._depth_of_line[line, num_rows])

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
        requests_before, end_before, cpu_before = self._last_decode
        cpu_clock: float | None = getattr(output, "cpu_clock", None)  # of the CPU runner's process
        self._last_decode = (num_requests if only_decoding else 0, now, cpu_clock)
        timed = only_decoding and requests_before == num_requests
        policy.saw_step(
            output.req_ids,
            lines,
            getattr(output, "last_nodes", []),
            now - end_before if timed else None,
            None if cpu_clock is None or cpu_before is None else cpu_clock - cpu_before,
        )
        if policy.review(now):
            logger.info("bita: rows by load now %s", policy.describe())
        if policy.broken_promise:
            logger.warning("bita: %s", policy.broken_promise)
        self._use_table(policy.lookup)

    def _use_table(self, table: list[int]) -> None:
        """Take these widths by number of requests, as far as they fit in a step."""
        if table != self._table:
            self._table = list(table)
            self.dynamic_sd_lookup = within_budget(
                table, self._widths, self.max_num_scheduled_tokens
            )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Stock; requests whose blocks do not pay go without: one row, from which the runner goes on."""
        self._grammar.take_lines(draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)
        for request_id in () if self._policy is None else self._policy.resting:
            if (request := self.requests.get(request_id)) is not None:
                request.spec_token_ids = []

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        """Stock; the grammar knows the blocks' trees."""
        self._grammar.take_lines(draft_token_ids)
        super().update_draft_token_ids_in_output(draft_token_ids, scheduler_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Stock, with a place for each depth."""
        if spec_decoding_stats is None and self.log_stats:
            spec_decoding_stats = SpecDecodingStats.new(self._max_depth)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )


class BitaScheduler(_BlockScheduler):
    """Each step is scheduled after the last one."""


class BitaAsyncScheduler(_BlockScheduler, AsyncScheduler):
    """The next step is scheduled while a step runs."""


def depth_offered(table: TemplateTable) -> np.ndarray:
    """`[R]` int: deepest draft node of a block with that many rows after its root.

    Blocks of the table have their own depth; other lengths are the full block, cut by the scheduler.
    """
    full = table.depth[-1, : table.num_nodes[-1]]
    offered = np.array([full[: rows + 1].max() for rows in range(table.template.num_rows)])
    offered[table.num_rows - 1] = depth_of_line(table)[:, -1]
    return offered


def depth_of_line(table: TemplateTable) -> np.ndarray:
    """`[lines, R]` int: deepest draft node of each line, cut to that many rows after its root."""
    is_node = np.arange(table.depth.shape[1]) < table.num_nodes[:, None]
    return np.maximum.accumulate(np.where(is_node, table.depth, 0), axis=1)

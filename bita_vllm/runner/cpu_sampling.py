"""Target tokens along the walk, by vLLM's own sampler on the batch's own sampling state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.sampler import Sampler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
    from vllm.v1.worker.gpu_input_batch import InputBatch

    from bita_vllm.step.host import StepBlocks


def constrain_nodes(
    # [N, V], changed in place
    logits: torch.Tensor,
    blocks: StepBlocks,
    request_ids: list[str],
    grammar: GrammarOutput,
) -> None:
    """Forbid at every node what its grammar forbids there: `BlockGrammar` made the bitmasks."""
    ids = grammar.structured_output_request_ids
    order = np.array([request_ids.index(request_id) for request_id in ids])
    num_nodes = blocks.num_nodes[order]
    masks = grammar.grammar_bitmask.reshape(len(ids), -1, grammar.grammar_bitmask.shape[1])
    inside = np.arange(masks.shape[1]) < num_nodes[:, None]
    rows = torch.from_numpy((blocks.first_node[order][:, None] + np.arange(masks.shape[1]))[inside])
    words = torch.from_numpy(masks[inside])
    allowed = (words[..., None] >> torch.arange(32, dtype=torch.int32) & 1).flatten(1).bool()
    logits[rows] = logits[rows].masked_fill(~allowed[:, : logits.shape[1]], -torch.inf)


class GreedyTargets:
    """Nothing but argmax is asked for: all nodes at once."""

    logprobs: LogprobsTensors | None = None

    def __init__(
        self,
        # [N, V]
        logits: torch.Tensor,
    ) -> None:
        self._targets = Sampler.greedy_sample(logits.float()).numpy()

    @staticmethod
    def fits(metadata: SamplingMetadata) -> bool:
        """Whether no request asks for more than argmax."""
        return (
            metadata.all_greedy
            and metadata.no_penalties
            and metadata.max_num_logprobs is None
            and not metadata.logprob_token_ids
            and metadata.allowed_token_ids_mask is None
            and not metadata.bad_words_token_ids
            and not any(_changes_argmax(p) for p in metadata.logitsprocs.non_argmax_invariant)
            and not has_thinking_budgets(metadata)
        )

    def __call__(self, nodes: np.ndarray, walking: np.ndarray, step: int) -> np.ndarray:
        return self._targets[nodes]

    def close(self) -> None:
        """Nothing to undo."""


def has_thinking_budgets(metadata: SamplingMetadata) -> bool:
    """Whether a request of the batch has a thinking budget."""
    holder = metadata.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


def _changes_argmax(processor: object) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    return not isinstance(processor, MinPLogitsProcessor)


class WalkingBudgets:
    """The thinking budgets of a batch in one call of vLLM's sampler, which asks for no more than these methods.

    Budgets count the tokens that came since the last call. Only those of requests that still walk have new ones;
    the others' state stays as it is. A row's drafts are none of its own: it is one token, as in a plain step.
    Source: vllm/v1/sample/thinking_budget_state.py.
    """

    def __init__(
        self,
        holder: ThinkingBudgetStateHolder,
        # [B]
        walking: np.ndarray,
    ) -> None:
        self._holder, self._requests = holder, np.flatnonzero(walking)

    def has_tracked_requests(self) -> bool:
        return self._holder.has_tracked_requests()

    def update_state(
        self, output_token_ids: list[list[int]], spec_token_ids: Any, repeat_indices: Any = None
    ) -> None:
        tokens = [output_token_ids[request] for request in self._requests]
        self._holder.update_state(tokens, None, torch.from_numpy(self._requests))

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: Any
    ) -> torch.Tensor:
        return self._holder.apply_to_logits(logits, predict_bonus_token, None)


class SampledTargets:
    """Draw each emitted token as a plain step would: vLLM's sampler, one call a depth, on the whole batch.

    Emitted tokens lie in the requests' output lists while the walk goes on, so penalties, bad words, thinking budgets
    and logits processors see them, and a seeded generator is used once a token: requests that have stopped
    walking do not touch theirs.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch: InputBatch,
        # [N, V]
        logits: torch.Tensor,
    ) -> None:
        self._sampler, self._batch, self._logits = sampler, batch, logits
        self._last = np.zeros(0, dtype=np.int64)
        self._pushed = np.zeros(batch.num_reqs, dtype=np.int64)
        self._steps: list[LogprobsTensors] = []

    def __call__(self, nodes: np.ndarray, walking: np.ndarray, step: int) -> np.ndarray:
        """`[B]` node of each request, `[B]` still walking -> `[B]` tokens."""
        metadata = self._batch.sampling_metadata
        if step > 0:
            for request in np.flatnonzero(walking):
                self._output(request).append(int(self._last[request]))
            self._pushed += walking
            for processor in metadata.logitsprocs.all:
                processor.update_state(None)
        changed: dict[str, Any] = {
            "generators": {i: g for i, g in metadata.generators.items() if walking[i]}
        }
        if has_thinking_budgets(metadata):
            # At first plain vLLM's step asks for all, partial prefills too.
            asked = walking if step > 0 else np.ones_like(walking)
            budgets = WalkingBudgets(metadata.thinking_budget_state_holder, asked)
            changed["thinking_budget_state_holder"] = budgets
        sampled = self._sampler(self._logits[torch.from_numpy(nodes)], replace(metadata, **changed))
        if sampled.logprobs_tensors is not None:
            self._steps.append(sampled.logprobs_tensors)
        self._last = sampled.sampled_token_ids[:, 0].numpy().astype(np.int64)
        return self._last

    def close(self) -> None:
        """Take the tokens back out of the output lists: vLLM's book-keeping adds them."""
        for request in np.flatnonzero(self._pushed):
            del self._output(request)[-int(self._pushed[request]) :]

    def _output(self, request: int) -> list[int]:
        output = self._batch.req_output_token_ids[request]
        assert output is not None
        return output

    @property
    def logprobs(self) -> LogprobsTensors | None:
        """`[B * steps, ...]`, request by request, as RejectionSampler.parse_output reads them."""
        if not self._steps:
            return None
        stacked = (
            torch.stack(column, dim=1).flatten(0, 1)
            for column in zip(*(s[:3] for s in self._steps), strict=True)
        )
        return LogprobsTensors(*stacked)

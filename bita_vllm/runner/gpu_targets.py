"""The target's own token at every draft node, by vLLM's V2 sampler.

Noise is keyed by (seed, position), so all nodes of all trees are sampled in one call, and a seeded
request draws plain vLLM's tokens. Penalties, bad words and thinking budgets look at the tokens before a
row, which in a tree are its ancestors: with those, the sampler is called along the walk, once a depth.
Source: vllm/v1/worker/gpu/sample/sampler.py, spec_decode/rejection_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler


@dataclass
class NodeRows:
    """Node rows of some requests of a step, N to each: row n of request b is its node n.

    Where a request has fewer nodes, its last row is repeated; the walk never looks there.

    Attributes:
        rows: `[B, N]` int64, row of the step.
        tokens: `[B, N]` int32, input token, the only type that vLLM's kernels compile with.
        positions: `[B, N]` int64, position in the sequence.
        logits: `[B * N, V]`.
        slots: `[B]` int64, vLLM's place of each request; slots_np on the host.
        seq_lens_np: `[B]` int32, upper bounds.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    slots: torch.Tensor
    slots_np: np.ndarray
    seq_lens_np: np.ndarray

    @classmethod
    def of(
        cls,
        # [B, N] int64
        rows: torch.Tensor,
        # [B * N, V]
        logits: torch.Tensor,
        part: slice,
        input_batch: InputBatch,
    ) -> NodeRows:
        """For the requests of `part`."""
        return cls(
            rows,
            input_batch.input_ids[rows],
            input_batch.positions[rows],
            logits,
            input_batch.idx_mapping[part],
            input_batch.idx_mapping_np[part],
            input_batch.seq_lens_cpu_upper_bound.numpy()[part],
        )


class TreeSampler:
    """Samples node rows; keeps what the logprobs of the emitted tokens need."""

    def __init__(
        self,
        sampler: Sampler,
        # [lines, R] int32, parent row of each row, -1 for the root and in padding
        parent: torch.Tensor,
        max_depth: int,
    ) -> None:
        self.sampler = sampler
        self.parent = parent
        self.max_depth = max_depth

    def __call__(
        self,
        nodes: NodeRows,
        # [B] int32, line of the template table, -1 for a request without a block
        line: torch.Tensor,
        wants_logprobs: bool,
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """`[B * N]` int64 targets, and what gives the logits for logprobs along a path.

        That function takes a path `[B, max_depth + 1]` of node indices and returns
        `[B * (max_depth + 1), V]`.
        """
        num_nodes = nodes.rows.shape[1]
        if self._looks_back(nodes.slots_np):
            return self._along_the_walk(nodes, line, wants_logprobs)
        sampled, processed = self._sample(
            nodes.logits,
            nodes,
            num_nodes,
            nodes.positions.flatten(),
            nodes.tokens.flatten(),
            torch.zeros_like(nodes.rows, dtype=torch.int32).flatten(),
            wants_logprobs,
        )
        scored = processed if self._scores_processed else nodes.logits
        return sampled, lambda path: scored[self._flat(path, num_nodes)]

    @property
    def _scores_processed(self) -> bool:
        return self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def _looks_back(self, requests: np.ndarray) -> bool:
        """Whether a request of the batch uses what depends on the tokens before a row."""
        budgets = self.sampler.thinking_budget_state
        return bool(
            self.sampler.penalties_state.use_penalty[requests].any()
            or (budgets.enabled and budgets.use_thinking_budget[requests].any())
            or any(
                processor.num_bad_words.np[requests].any()
                for processor in self.sampler.logits_processors
                if isinstance(processor, BadWordsState)
            )
        )

    def _along_the_walk(
        self, nodes: NodeRows, line: torch.Tensor, wants_logprobs: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """One call a depth on the walk's path so far, laid out as a chain of drafts."""
        num_requests, num_nodes = nodes.rows.shape
        request = torch.arange(num_requests, device=line.device)
        node = torch.zeros_like(request)
        walking = torch.ones_like(request, dtype=torch.bool)
        targets = torch.full_like(nodes.rows, -1)
        parent = self.parent[line.clamp(min=0).long(), :num_nodes]
        is_child = (parent >= 0) & (line >= 0)[:, None]
        path, processed_steps = node[:, None], []
        for depth in range(self.max_depth + 1):
            length = depth + 1
            local = torch.arange(length, dtype=torch.int32, device=line.device)
            sampled, processed = self._sample(
                nodes.logits[self._flat(path, num_nodes)],
                nodes,
                length,
                nodes.positions.gather(1, path).flatten(),
                nodes.tokens.gather(1, path).flatten(),
                local.repeat(num_requests),
                wants_logprobs,
            )
            token = sampled.view(num_requests, length)[:, -1]
            processed_steps.append(processed.view(num_requests, length, -1)[:, -1])
            targets[request, node] = torch.where(walking, token, targets[request, node])
            child = is_child & (parent == node[:, None]) & (nodes.tokens == token[:, None])
            walking = walking & child.any(dim=1)
            node = torch.where(walking, child.int().argmax(dim=1), node)
            path = torch.cat([path, node[:, None]], dim=1)

        def path_logits(taken: torch.Tensor) -> torch.Tensor:
            if self._scores_processed:
                return torch.stack(processed_steps, dim=1).flatten(0, 1)
            return nodes.logits[self._flat(taken, num_nodes)]

        return targets.flatten(), path_logits

    def _sample(
        self,
        # [B * n, V]
        logits: torch.Tensor,
        nodes: NodeRows,
        # n, rows of each request
        rows_each: int,
        # [B * n] int64
        positions: torch.Tensor,
        # [B * n] int32
        tokens: torch.Tensor,
        # [B * n] int32, index in a chain of drafts
        local_positions: torch.Tensor,
        wants_logprobs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sampler.sample(
            logits,
            nodes.slots.repeat_interleave(rows_each),
            nodes.slots,
            nodes.slots_np,
            positions,
            tokens,
            local_positions,
            nodes.seq_lens_np,
            return_logprobs=wants_logprobs,
        )

    def logprobs(
        self,
        # [B * (max_depth + 1), V]
        logits: torch.Tensor,
        # [B, max_depth + 1] int64, emitted tokens, -1 behind the last
        tokens: torch.Tensor,
        slots: torch.Tensor,
        # from the sampler's get_logprobs_dims
        dims: tuple[int, int],
    ) -> LogprobsTensors:
        """Logprobs of the emitted tokens, max_depth + 1 rows to each request."""
        num_logprobs, max_token_ids = dims
        num_requests, steps = tokens.shape
        return compute_topk_scores(
            logits,
            num_logprobs,
            tokens.clamp(min=0).flatten(),
            [i * steps for i in range(num_requests + 1)],
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=slots.repeat_interleave(steps),
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    @staticmethod
    def _flat(
        # [B, n] node indices
        path: torch.Tensor,
        num_nodes: int,
    ) -> torch.Tensor:
        """`[B * n]` int64, rows of the logits."""
        first = torch.arange(len(path), device=path.device)[:, None] * num_nodes
        return (first + path).flatten()

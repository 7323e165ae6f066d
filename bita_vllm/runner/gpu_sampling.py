"""The target's own token at every draft node, by vLLM's V2 sampler.

Noise is keyed by (seed, position), so all nodes of all trees are sampled in one call, and a seeded
request draws plain vLLM's tokens. Penalties, bad words and thinking budgets look at the tokens before a
row, which in a tree are its ancestors, and the user's own logits processors may: with those, the sampler is
called along the walk, once a depth, on rows that lie as those of drafts in a chain do.
Source: vllm/v1/worker/gpu/sample/sampler.py, spec_decode/rejection_sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from bita_kernels.extend_paths import Chains, extend_paths
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from bita_vllm.step.device import StepTrees


@dataclass
class NodeRows:
    """Nodes of some requests of a step, N to each: node n of request b is row b * N + n.

    Where a request has fewer nodes, its last one is repeated; the walk never looks there.

    Attributes:
        num_nodes: N.
        tokens: `[B * N]` int32, input token, the only type that vLLM's kernels compile with.
        positions: `[B * N]` int64, position in the sequence.
        expanded_slots: `[B * N]` int64, slot of each node's request.
        logits: `[B * N, V]`.
        slots: `[B]` int64, vLLM's place of each request; slots_np on the host.
        seq_lens_np: `[B]` int32, upper bounds.
    """

    num_nodes: int
    tokens: torch.Tensor
    positions: torch.Tensor
    expanded_slots: torch.Tensor
    logits: torch.Tensor
    slots: torch.Tensor
    slots_np: np.ndarray
    seq_lens_np: np.ndarray

    @classmethod
    def of(
        cls,
        trees: StepTrees,
        # [B * N, V]
        logits: torch.Tensor,
        part: slice,
        input_batch: InputBatch,
    ) -> NodeRows:
        """For the requests of `part`."""
        nodes = trees.nodes_of(part)
        return cls(
            trees.num_nodes,
            trees.node_tokens[nodes],
            trees.node_positions[nodes],
            trees.node_slots[nodes],
            logits,
            input_batch.idx_mapping[part],
            input_batch.idx_mapping_np[part],
            input_batch.seq_lens_cpu_upper_bound.numpy()[part],
        )


class TreeSampler:
    """Samples nodes; keeps what the logprobs of the emitted tokens need."""

    def __init__(self, sampler: Sampler, trees: StepTrees) -> None:
        self.sampler = sampler
        self.trees = trees
        # [max_num_reqs * most nodes] int32: a node sampled by itself is the first of its chain
        self._no_local_positions = torch.zeros_like(trees.node_tokens)
        stock = (LogitBiasState, PenaltiesState, BadWordsState)
        self._has_own_processors = any(
            not isinstance(processor, stock) for processor in sampler.logits_processors
        )

    def warm_up(self) -> None:
        """Compile what only requests with penalties launch, so that none of them waits for it."""
        trees, nodes, one = self.trees, slice(0, self.trees.most_nodes), slice(0, 1)
        extend_paths(
            None,
            0,
            trees.line[one],
            trees.num_rows[one],
            trees.node_tokens[nodes],
            trees.node_positions[nodes],
            trees.node_slots[one],
            trees.table,
            Chains.empty(1, trees.most_nodes, trees.table),
        )

    def __call__(
        self, nodes: NodeRows, part: slice, wants_logprobs: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """`[B * N]` int64 targets, and what gives the logits for logprobs along a path.

        `nodes` are those of `part`. That function takes a path `[B, steps]` of node indices and returns
        `[B * steps, V]`, where `StepTrees.steps` are the most of a walk.
        """
        if self._looks_back(nodes.slots_np):
            return self._along_the_walk(nodes, part, wants_logprobs)
        local_positions = self._no_local_positions[: len(nodes.tokens)]
        sampled, processed = self.sampler.sample(
            nodes.logits,
            nodes.expanded_slots,
            nodes.slots,
            nodes.slots_np,
            nodes.positions,
            nodes.tokens,
            local_positions,
            nodes.seq_lens_np,
            return_logprobs=wants_logprobs,
        )
        scored = processed if self._scores_processed else nodes.logits
        return sampled, lambda path: scored[self._flat(path, nodes.num_nodes)]

    @property
    def _scores_processed(self) -> bool:
        return self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def _looks_back(self, requests: np.ndarray) -> bool:
        """Whether a request of the batch uses what depends on the tokens before a row.

        What the user's own logits processors depend on, nobody knows.
        """
        budgets = self.sampler.thinking_budget_state
        return bool(
            (self._has_own_processors and self.sampler.needs_logits_processing[requests].any())
            or self.sampler.penalties_state.use_penalty[requests].any()
            or (budgets.enabled and budgets.use_thinking_budget[requests].any())
            or any(
                processor.num_bad_words.np[requests].any()
                for processor in self.sampler.logits_processors
                if isinstance(processor, BadWordsState)
            )
        )

    def _along_the_walk(
        self, nodes: NodeRows, part: slice, wants_logprobs: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """One call a depth on the walk's path so far, laid out as a chain of drafts.

        Of a call's logits only each chain's last row is kept, as a copy, and only where it is scored.
        """
        trees, num_requests = self.trees, len(nodes.slots)
        chains = Chains.empty(num_requests, nodes.num_nodes, trees.table)
        keeps_processed = wants_logprobs and self._scores_processed
        processed_steps, sampled = [], None
        for length in range(trees.steps + 1):
            extend_paths(
                sampled,
                length,
                trees.line[part],
                trees.num_rows[part],
                nodes.tokens,
                nodes.positions,
                nodes.slots,
                trees.table,
                chains,
            )
            if length == trees.steps:
                break
            rows = slice(0, num_requests * (length + 1))
            sampled, processed = self.sampler.sample(
                nodes.logits[chains.rows[rows]],
                chains.slots[rows],
                nodes.slots,
                nodes.slots_np,
                chains.positions[rows],
                chains.tokens[rows],
                chains.local[rows],
                nodes.seq_lens_np,
                return_logprobs=wants_logprobs,
            )
            if keeps_processed:
                processed_steps.append(processed.view(num_requests, length + 1, -1)[:, -1].clone())
            del processed

        def path_logits(taken: torch.Tensor) -> torch.Tensor:
            if self._scores_processed:
                return torch.stack(processed_steps, dim=1).flatten(0, 1)
            return nodes.logits[self._flat(taken, nodes.num_nodes)]

        return chains.targets, path_logits

    def logprobs(
        self,
        # [B * steps, V]
        logits: torch.Tensor,
        # [B, steps] int64, emitted tokens, -1 after the last
        tokens: torch.Tensor,
        slots: torch.Tensor,
        # from the sampler's get_logprobs_dims
        dims: tuple[int, int],
    ) -> LogprobsTensors:
        """Logprobs of the emitted tokens, as many rows to each request as a walk may have steps."""
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

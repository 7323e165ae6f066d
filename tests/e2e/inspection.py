"""Looking into the runner of a process, and putting known tokens into its blocks.

Both runners: vLLM's CPU runner, and the V2 runner when the tests run with `--runner gpu`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testbed.engines import ON_GPU_RUNNER
from transformers import AutoModelForCausalLM
from vllm import LLM, RequestOutput

from bita_vllm.tree import NO_BLOCK, TemplateTable


@dataclass(frozen=True)
class StepRecord:
    """One request in one step.

    Attributes:
        request: vLLM's request id.
        line: of the template table (with one template: depths that had candidates), -1 without a block.
        path: rows of the block that were taken, root first.
        tokens: emitted by the walk, before a stop or max_tokens cuts them.
    """

    request: str
    line: int
    path: list[int]
    tokens: list[int]


@contextmanager
def recorded_steps() -> Iterator[list[StepRecord]]:
    """What every walk of this process finds, step by step."""
    steps: list[StepRecord] = []
    with pytest.MonkeyPatch.context() as patch:
        (_record_gpu if ON_GPU_RUNNER else _record_cpu)(patch, steps)
        yield steps


def _record_cpu(patch: pytest.MonkeyPatch, steps: list[StepRecord]) -> None:
    from bita_vllm.runner.cpu import BitaCPUModelRunner

    sample = BitaCPUModelRunner._sample

    def recording(self: BitaCPUModelRunner, *args: Any) -> Any:
        output = sample(self, *args)
        requests, step = self.input_batch.req_ids, self._step
        if step.blocks is None:  # a plain step
            for request, token in zip(requests, output.sampled_token_ids.tolist(), strict=True):
                steps.append(StepRecord(request, NO_BLOCK, [0], token))
        else:
            lines, walk = step.blocks.line.tolist(), step.walk
            _append(steps, requests, lines, walk.path, walk.tokens, walk.num_emitted)
        return output

    patch.setattr(BitaCPUModelRunner, "_sample", recording)


def _record_gpu(patch: pytest.MonkeyPatch, steps: list[StepRecord]) -> None:
    from bita_vllm.runner.gpu import BitaGPUModelRunner

    sample = BitaGPUModelRunner.sample

    def recording(self: BitaGPUModelRunner, hidden_states: Any, batch: Any, grammar: Any) -> Any:
        output = sample(self, hidden_states, batch, grammar)
        trees, counts = self.model_state.trees, output[1].numpy()
        tokens = output[0].sampled_token_ids.numpy()
        _append(steps, batch.req_ids, trees.line.tolist(), trees.path.numpy(), tokens, counts)
        return output

    patch.setattr(BitaGPUModelRunner, "sample", recording)


def _append(
    steps: list[StepRecord],
    requests: list[str],
    lines: list[int],
    path: np.ndarray,
    tokens: np.ndarray,
    num_emitted: np.ndarray,
) -> None:
    for i, request in enumerate(requests):
        n = int(num_emitted[i])
        if n:
            taken = path[i, :n].tolist() if lines[i] >= 0 else [0]
            steps.append(StepRecord(request, lines[i], taken, tokens[i, :n].tolist()))


# request -> {position of a root: [k, V] logits of its mask group}
Groups = dict[str, dict[int, torch.Tensor]]


@contextmanager
def recorded_groups(num_masks: int) -> Iterator[Groups]:
    """Logits of the whole group under every block's root, as the runner computes them."""
    groups: Groups = defaultdict(dict)
    with pytest.MonkeyPatch.context() as patch:
        (_groups_gpu if ON_GPU_RUNNER else _groups_cpu)(patch, groups, num_masks)
        yield groups


def _groups_cpu(patch: pytest.MonkeyPatch, groups: Groups, num_masks: int) -> None:
    from bita_vllm.runner.cpu import BitaCPUModelRunner

    propose = BitaCPUModelRunner.propose_draft_token_ids

    def recording(self: BitaCPUModelRunner, *args: Any) -> Any:
        hidden_states, blocks = args[3], self._step.blocks
        if blocks is None:  # a plain step
            return propose(self, *args)
        for request, line, first in zip(
            self.input_batch.req_ids, blocks.line, blocks.first_row, strict=True
        ):
            if line >= 0:
                rows = int(first) + _group_of_root(self.table, line, num_masks)
                logits = self.model.compute_logits(hidden_states[rows])
                groups[request.split("-")[0]][int(self.positions[first])] = logits.clone()
        return propose(self, *args)

    patch.setattr(BitaCPUModelRunner, "propose_draft_token_ids", recording)


def _groups_gpu(patch: pytest.MonkeyPatch, groups: Groups, num_masks: int) -> None:
    from bita_vllm.runner.gpu import BlockSpeculator

    propose = BlockSpeculator.propose

    def recording(
        self: BlockSpeculator,
        batch: Any,
        metadata: Any,
        slots: Any,
        hidden_states: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        lines, first_rows = self.trees.line.tolist(), self.trees.first_row.tolist()
        for request, line, first in zip(batch.req_ids, lines, first_rows, strict=False):
            if line >= 0:
                rows = first + _group_of_root(self.trees.table, line, num_masks)
                logits = self.source.compute_logits(hidden_states[rows])
                groups[request.split("-")[0]][int(batch.positions[first])] = logits.clone()
        return propose(self, batch, metadata, slots, hidden_states, *args, **kwargs)

    patch.setattr(BlockSpeculator, "propose", recording)


def _group_of_root(table: Any, line: int, num_masks: int) -> np.ndarray:
    """`[k]` rows in the block: each mask is the child of the one before, the first the root's."""
    mask_index, parent = np.asarray(table.mask_index[line]), np.asarray(table.parent[line])
    rows = [0]
    while len(rows) <= num_masks:
        (row,) = np.flatnonzero((mask_index >= 0) & (parent == rows[-1]))
        rows.append(int(row))
    return np.array(rows[1:])


def compare_with_trainer(
    model: Path, adapter: Path, outputs: Iterable[RequestOutput], groups: Groups
) -> tuple[int, float]:
    """Groups compared, and the largest difference between their logits and the trainer's (fp32)."""
    from bita_vllm.training.mask_model import MaskModel

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = MaskModel.from_adapter(base, adapter)
    worst, compared = 0.0, 0
    for output in outputs:
        served = groups[output.request_id]
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        roots = torch.tensor([sorted(position for position in served if position < ids.shape[1])])
        with torch.no_grad():
            logits = trained.mask_logits(trained.context(ids), roots)[0]
        theirs = torch.stack([served[position] for position in roots[0].tolist()])
        worst = max(worst, float((logits - theirs).abs().max()))
        compared += roots.shape[1]
        assert float(theirs.std()) > 0.1, "logits that say nothing"
    return compared, worst


# Prompt and output so far of one request -> what is known to follow (may be short or empty)
Continuation = Callable[[list[int], list[int]], list[int]]


def known(outputs: Iterable[RequestOutput]) -> Continuation:
    """The continuation that finished `outputs` hold."""
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for output in outputs:
        tokens = by_prompt.setdefault(tuple(output.prompt_token_ids), [])
        tokens += [list(completion.token_ids) for completion in output.outputs]

    def continuation(prompt: list[int], so_far: list[int]) -> list[int]:
        n = len(so_far)
        fits = [o for o in by_prompt.get(tuple(prompt), ()) if o[:n] == so_far]
        return max(fits, key=len, default=so_far)[n:]

    return continuation


@contextmanager
def oracle(continuation: Continuation) -> Iterator[None]:
    """Candidates from a known continuation instead of the mask rows' logits, wrong ones elsewhere.

    The known tokens lie along the path to one node of each block: of every line of the template table each
    node once, in random order, before any comes again. So walks end at all of them, of any rank and depth. All
    else (which depths have candidates, the block's rows, verification, KV moves) is the runner's.
    """
    with pytest.MonkeyPatch.context() as patch:
        (_oracle_gpu if ON_GPU_RUNNER else _oracle_cpu)(patch, continuation)
        yield


class _Candidates:
    """Candidates of each block, from the tokens that are known to follow its root."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._ends: dict[int, list[int]] = defaultdict(list)  # by line: nodes still to come

    def __call__(
        self, table: TemplateTable, line: int, vocab_size: int, follows: list[int]
    ) -> np.ndarray:
        """`[depths, max_rank]`: the known tokens on the path to the line's next node, else wrong ones."""
        num_nodes = table.num_nodes[line]
        if not self._ends[line]:
            self._ends[line] = self._rng.permutation(num_nodes).tolist()
        path, row = [], self._ends[line].pop()
        while row > 0:
            path.insert(0, int(table.rank[line, row]))
            row = int(table.parent[line, row])
        depths = table.depth[line, :num_nodes].max()
        candidates = self._rng.integers(0, vocab_size, size=(depths, table.rank.max() + 1))
        for depth, (truth, wrong) in enumerate(zip(follows, candidates, strict=False)):
            wrong[wrong == truth] = (truth + 1) % vocab_size
            if depth < len(path):
                wrong[path[depth]] = truth
        return candidates


def _oracle_cpu(patch: pytest.MonkeyPatch, continuation: Continuation) -> None:
    from bita_vllm.runner import cpu
    from bita_vllm.runner.cpu import BitaCPUModelRunner

    next_candidates = _Candidates()
    runners: list[BitaCPUModelRunner] = []
    propose, fill = BitaCPUModelRunner.propose_draft_token_ids, cpu.fill_blocks

    def proposing(self: BitaCPUModelRunner, *args: Any) -> Any:
        runners[:] = [self]
        return propose(self, *args)

    def filling(
        table: TemplateTable, lines: np.ndarray, tokens: np.ndarray, first_mask_id: int
    ) -> Any:
        (runner,) = runners
        known = np.zeros((len(lines), table.max_depth, table.rank.max() + 1), dtype=np.int64)
        for i, (request, line) in enumerate(
            zip(runner.input_batch.req_ids, lines.tolist(), strict=True)
        ):
            state = runner.requests[request]
            follows = continuation(list(state.prompt_token_ids), list(state.output_token_ids))
            wanted = next_candidates(table, line, first_mask_id, follows)
            known[i, : len(wanted)] = wanted
        return fill(table, lines, known, first_mask_id)

    patch.setattr(BitaCPUModelRunner, "propose_draft_token_ids", proposing)
    patch.setattr(cpu, "fill_blocks", filling)


def _oracle_gpu(patch: pytest.MonkeyPatch, continuation: Continuation) -> None:
    from bita_vllm.runner.gpu import BitaGPUModelRunner, BlockSpeculator

    next_candidates = _Candidates()
    runners: list[BitaGPUModelRunner] = []
    sample, propose = BitaGPUModelRunner.sample, BlockSpeculator.propose

    def sampling(self: BitaGPUModelRunner, *args: Any) -> Any:
        runners[:] = [self]
        return sample(self, *args)

    def proposing(self: BlockSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(self, batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return drafts
        (runner,) = runners
        states, trees = runner.req_states, runner.model_state.trees
        table = runner.settings.ladder.table
        for i, slot in enumerate(batch.idx_mapping.tolist()):
            line = int(trees.line_of_slot[slot])
            prompt_len, total = int(states.prompt_len.np[slot]), int(states.total_len.gpu[slot])
            tokens = states.all_token_ids.gpu[slot, :total].tolist()
            follows = continuation(tokens[:prompt_len], tokens[prompt_len:])
            candidates = next_candidates(table, line, self.vocab_size, follows)
            depth, rank = table.depth[line, 1:], table.rank[line, 1:]
            node = np.flatnonzero(rank >= 0)
            drafts[i, torch.from_numpy(node)] = torch.from_numpy(
                candidates[depth[node] - 1, rank[node]]
            )
        return drafts

    patch.setattr(BitaGPUModelRunner, "sample", sampling)
    patch.setattr(BlockSpeculator, "propose", proposing)


def enter_in_ranks(
    llm: LLM, *contexts: Callable[[], AbstractContextManager]
) -> Callable[[], list[list[Any]]]:
    """Enter `contexts` in the process of every tensor-parallel rank, until the engine ends.

    What comes back fetches what they have yielded: one list a rank, in the order of `contexts`.
    """

    def enter(worker: Any) -> None:
        worker.inspection = ExitStack()
        worker.inspected = [worker.inspection.enter_context(make()) for make in contexts]

    llm.collective_rpc(enter)
    return lambda: llm.collective_rpc(lambda worker: worker.inspected)

"""Memory of the sampler's passes along the walk (penalties): logits of a depth go before the next depth's come."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bita_kernels.extend_paths import extend_paths_naive
from torch.multiprocessing.reductions import StorageWeakRef

from bita_vllm.runner import gpu_sampling as gpu_targets
from bita_vllm.runner.gpu_sampling import NodeRows, TreeSampler
from bita_vllm.step.device import StepTrees
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table

VOCAB_SIZE, NUM_REQUESTS = 64, 3
ROW_BYTES = VOCAB_SIZE * 4


class CountingSampler:
    """In vLLM's sampler's place: greedy, fp32 copies of logits; notes how many bytes of them live at once."""

    thinking_budget_state = SimpleNamespace(enabled=False)
    penalties_state = SimpleNamespace(use_penalty=np.ones(NUM_REQUESTS, dtype=bool))
    logits_processors = ()

    def __init__(self, logprobs_mode: str) -> None:
        self.logprobs_mode = logprobs_mode
        self.peak = 0
        self._made: list[tuple[StorageWeakRef, int]] = []

    def live_bytes(self) -> int:
        return sum(size for storage, size in self._made if not storage.expired())

    def sample(self, logits, *args, return_logprobs):
        processed = logits.float() * 0.5
        self._made.append((StorageWeakRef(processed.untyped_storage()), processed.nbytes))
        self.peak = max(self.peak, self.live_bytes())
        return logits.argmax(dim=-1), processed


@pytest.fixture
def trees(monkeypatch):
    monkeypatch.setattr(gpu_targets, "extend_paths", extend_paths_naive)
    ladder = Ladder.fixed(Template.from_widths([1, 1, 1], 3))
    trees = StepTrees(ladder, acceptance_table(None, 3), NUM_REQUESTS, torch.device("cpu"))
    trees.line.fill_(trees.table.max_depth)
    trees.num_rows.fill_(trees.table.num_rows)
    trees.num_nodes = trees.table.max_nodes
    return trees


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("wants_logprobs", [False, True], ids=["tokens", "logprobs"])
def test_only_one_depths_logits_live_at_once(trees, mode, wants_logprobs):
    """They were kept for all depths: (D + 1)(D + 2) / 2 rows of a request."""
    steps, nodes = trees.table.max_depth + 1, trees.table.max_nodes
    logits = torch.randn(
        NUM_REQUESTS * nodes, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)
    )
    # The chain's tokens are the targets, so that every walk goes to its end.
    tokens = logits.argmax(dim=-1).view(NUM_REQUESTS, nodes).roll(1, dims=1).flatten().int()
    slots = torch.arange(NUM_REQUESTS)
    rows = NodeRows(
        num_nodes=nodes,
        tokens=tokens,
        positions=torch.arange(NUM_REQUESTS * nodes),
        expanded_slots=slots.repeat_interleave(nodes),
        logits=logits,
        slots=slots,
        slots_np=slots.numpy(),
        seq_lens_np=np.full(NUM_REQUESTS, 9, dtype=np.int32),
    )
    sampler = CountingSampler(mode)
    targets, path_logits = TreeSampler(sampler, trees)(rows, slice(0, NUM_REQUESTS), wants_logprobs)
    assert torch.equal(targets, logits.argmax(dim=-1))
    assert sampler.peak == NUM_REQUESTS * steps * ROW_BYTES
    assert sampler.live_bytes() == 0, "logits of all rows stay"
    if wants_logprobs:
        path = torch.arange(steps).expand(NUM_REQUESTS, steps)
        scored = logits * 0.5 if mode.startswith("processed") else logits
        assert torch.equal(path_logits(path), scored)

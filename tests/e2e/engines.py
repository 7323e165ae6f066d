"""Real vLLM engines inside the test process: plain and bita on the same requests.

In the process, so that a test can look into the runner (`recorded_steps`) and put known tokens into
its blocks (`oracle`). Prompts are token ids; an engine is freed when its `with` block ends.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads both when an engine starts
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from bita_vllm.adapter import ModelShape, random_adapter, save_adapter
from bita_vllm.runner.blocks import NextBlocks
from bita_vllm.runner.cpu import BitaCPUModelRunner
from bita_vllm.tree import TemplateTable

NEAR_TIE = 1e-4  # of the base model's top two logits: there, fp32 rounding may choose the token

Requests = Sequence[tuple[list[int], SamplingParams]]


@contextmanager
def engine(model: Path, bita: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """An engine in this process; `bita` is the speculative config less the method."""
    if bita is not None:
        options["speculative_config"] = {"method": "bita", **bita}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "block_size": 32,
        "disable_log_stats": False,
    }
    llm = LLM(str(model), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: LLM, requests: Requests) -> list[RequestOutput]:
    """All requests at once, outputs in their order."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    return llm.generate(prompts, [params.clone() for _, params in requests], use_tqdm=False)


def run(
    model: Path, requests: Requests, bita: dict[str, Any] | None = None, **options: Any
) -> list[RequestOutput]:
    """`generate` in an engine of its own."""
    with engine(model, bita, **options) as llm:
        return generate(llm, requests)


def metric(llm: LLM, name: str) -> int:
    """The counter `vllm:NAME`; prometheus counts over all engines of the process, so take differences."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def make_adapter(model: Path, folder: Path, num_mask_tokens: int = 3, seed: int = 0) -> Path:
    """A random adapter for a tiny model."""
    config = json.loads((model / "config.json").read_text())
    shape = ModelShape.from_hf_config(config)
    adapter = random_adapter(
        shape, num_mask_tokens, 4, seed, embedding_std=0.15, prompt_std=0.5, verifier=str(model)
    )
    save_adapter(folder, adapter)
    return folder


# --- Looking into the runner --------------------------------------------------------------------


@dataclass(frozen=True)
class StepRecord:
    """One request in one step.

    Attributes:
        request: vLLM's request id.
        line: depths that the block had candidates for, -1 without a block.
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
    sample = BitaCPUModelRunner._sample

    def recording(self: BitaCPUModelRunner, *args: Any) -> Any:
        output = sample(self, *args)
        walk, lines = self._walk, self._blocks.line.tolist()
        for i, (request, line) in enumerate(zip(self.input_batch.req_ids, lines, strict=True)):
            n = int(walk.num_emitted[i])
            if n:
                taken = walk.path[i, :n].tolist(), walk.tokens[i, :n].tolist()
                steps.append(StepRecord(request, line, *taken))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitaCPUModelRunner, "_sample", recording)
        yield steps


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
def oracle(continuation: Continuation, vocab_size: int, seed: int = 0) -> Iterator[None]:
    """Candidates from a known continuation instead of the mask rows' logits, wrong ones elsewhere.

    The known tokens lie along the path to one random node of each block, so that walks end at every
    node of the template, of any rank and depth. All else (which depths have candidates, the block's
    rows, verification, KV moves) is the runner's.
    """
    rng = np.random.default_rng(seed)
    runners: list[BitaCPUModelRunner] = []
    propose, fill = BitaCPUModelRunner.propose_draft_token_ids, NextBlocks.fill

    def proposing(self: BitaCPUModelRunner, *args: Any) -> Any:
        runners[:] = [self]
        return propose(self, *args)

    def filling(
        self: NextBlocks, table: TemplateTable, top_tokens: np.ndarray, first_mask_id: int
    ) -> Any:
        candidates = rng.integers(0, vocab_size, size=top_tokens.shape)
        (runner,) = runners
        places = np.cumsum(self.mask_rows.ravel() >= 0).reshape(self.mask_rows.shape) - 1
        for i, request in enumerate(runner.input_batch.req_ids):
            line = int(self.line[i])
            if line == 0:
                continue
            state = runner.requests[request]
            # After the next token, which the root's own row gives, come the candidates' places.
            follows = continuation(list(state.prompt_token_ids), list(state.output_token_ids))
            path, row = [], int(rng.integers(1, table.num_nodes[line]))
            while row > 0:
                path.append(int(table.rank[line, row]))
                row = int(table.parent[line, row])
            for depth, rank in enumerate(reversed(path)):
                if depth < len(follows):
                    truth = follows[depth]
                    wrong = candidates[places[i, depth]]
                    wrong[wrong == truth] = (truth + 1) % vocab_size
                    wrong[rank] = truth
        return fill(self, table, candidates, first_mask_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitaCPUModelRunner, "propose_draft_token_ids", proposing)
        patch.setattr(NextBlocks, "fill", filling)
        yield

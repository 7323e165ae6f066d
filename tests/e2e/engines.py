"""Real vLLM engines inside the test process: plain and bita on the same requests.

In the process, so that a test can look into the runner (`recorded_steps`) and put known tokens into
its blocks (`oracle`). Prompts are token ids; an engine is freed when its `with` block ends.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from bita_vllm.adapter import ModelShape, random_adapter, save_adapter
from bita_vllm.runner.blocks import NextBlocks
from bita_vllm.runner.cpu import BitaCPUModelRunner
from bita_vllm.tree import TemplateTable

NEAR_TIE = 1e-4  # of the base model's top two logits: there, fp32 rounding may choose the token

Requests = Sequence[tuple[list[int], SamplingParams]]


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """One for tiny models: on a busy machine they would wait for the second most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def idle_threads() -> int:
    """Every core for a larger model, unless others use them: then threads wait for each other."""
    return psutil.cpu_count() if psutil.cpu_percent(interval=1) < 25 else 1


@contextmanager
def engine(
    model: Path, bita: dict[str, Any] | None = None, threads: int = 1, **options: Any
) -> Iterator[LLM]:
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
        "kv_cache_memory_bytes": 2**30,
    }
    with torch_threads(threads), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it: put back
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


@dataclass(frozen=True)
class Difference:
    """Where a greedy output leaves plain vLLM's, and the gap of plain vLLM's own top two logits."""

    request: int
    position: int
    plain: int
    bita: int
    gap: float
    top: float  # the first of the two: a logprob, or a logit with logprobs_mode='raw_logits'


def differences(
    plain_llm: Callable[[], Any],
    requests: Requests,
    plain: Sequence[RequestOutput],
    bita: Sequence[RequestOutput],
) -> list[Difference]:
    """First difference of every request whose tokens differ, one output a request.

    `plain_llm` starts a plain engine (a `with engine(...)` target); only if there is a difference.
    """
    found = []
    for i, (a, b) in enumerate(zip(plain, bita, strict=True)):
        x, y = (list(output.outputs[0].token_ids) for output in (a, b))
        if x != y:
            pairs = list(zip_longest(x, y, fillvalue=-1))
            position = next(n for n, (p, q) in enumerate(pairs) if p != q)
            found.append((i, position, *pairs[position]))
    if not found:
        return []
    top_two = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    again = [
        (requests[i][0] + list(plain[i].outputs[0].token_ids[:position]), top_two)
        for i, position, _, _ in found
    ]
    with plain_llm() as llm:
        tops = generate(llm, again)
    result = []
    for place, output in zip(found, tops, strict=True):
        first, second = sorted(p.logprob for p in output.outputs[0].logprobs[0].values())[:-3:-1]
        result.append(Difference(*place, gap=first - second, top=first))
        print(result[-1])
    return result


def metric(llm: LLM, name: str) -> int:
    """The counter `vllm:NAME`, over all engines of the process: take differences."""
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
def oracle(continuation: Continuation) -> Iterator[None]:
    """Candidates from a known continuation instead of the mask rows' logits, wrong ones elsewhere.

    The known tokens lie along the path to one random node of each block, so that walks end at every
    node of the template, of any rank and depth. All else (which depths have candidates, the block's
    rows, verification, KV moves) is the runner's.
    """
    rng = np.random.default_rng(0)
    runners: list[BitaCPUModelRunner] = []
    propose, fill = BitaCPUModelRunner.propose_draft_token_ids, NextBlocks.fill

    def proposing(self: BitaCPUModelRunner, *args: Any) -> Any:
        runners[:] = [self]
        return propose(self, *args)

    def filling(
        self: NextBlocks, table: TemplateTable, top_tokens: np.ndarray, first_mask_id: int
    ) -> Any:
        candidates = rng.integers(0, first_mask_id, size=top_tokens.shape)
        (runner,) = runners
        places = np.cumsum(self.mask_rows.ravel() >= 0).reshape(self.mask_rows.shape) - 1
        for i, request in enumerate(runner.input_batch.req_ids):
            line = int(self.line[i])
            if line == 0:
                continue
            state = runner.requests[request]
            # After the next token, which the root's own row gives, come the candidates' places.
            follows = continuation(list(state.prompt_token_ids), list(state.output_token_ids))
            path, row = [], int(rng.integers(0, table.num_nodes[line]))
            while row > 0:
                path.append(int(table.rank[line, row]))
                row = int(table.parent[line, row])
            for depth, rank in enumerate(reversed(path)):
                if depth < len(follows):
                    truth = follows[depth]
                    wrong = candidates[places[i, depth]]
                    wrong[wrong == truth] = (truth + 1) % first_mask_id
                    wrong[rank] = truth
        return fill(self, table, candidates, first_mask_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitaCPUModelRunner, "propose_draft_token_ids", proposing)
        patch.setattr(NextBlocks, "fill", filling)
        yield

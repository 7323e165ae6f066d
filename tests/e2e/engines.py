"""Real vLLM engines inside the test process: plain and bita on the same requests.

In the process, so that a test can look into the runner and put known tokens into its blocks
(inspection.py). Prompts are token ids; an engine is freed when its `with` block ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from testbed.engines import engine
from transformers import AutoModelForCausalLM
from vllm import LLM, RequestOutput, SamplingParams

from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.training.mask_lora import MaskLora

NEAR_TIE = 1e-4  # of the base model's top two logits: there, fp32 rounding may choose the token

Request = tuple[list[int], SamplingParams]  # a prompt's token ids, and what is asked for
Requests = Sequence[Request]


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


def make_adapter(
    model: Path, folder: Path, num_mask_tokens: int = 3, seed: int = 0, lora_rank: int = 0
) -> Path:
    """A random adapter for a tiny model; with a `lora_rank`, random deltas as large as its weights."""
    config = json.loads((model / "config.json").read_text())
    shape = ModelShape.from_hf_config(config)
    adapter = random_adapter(
        shape, num_mask_tokens, 4, seed, embedding_std=0.15, prompt_std=0.5, verifier=str(model)
    )
    if lora_rank:
        adapter = replace(adapter, mask_lora=random_mask_lora(model, lora_rank, seed))
    save_adapter(folder, adapter)
    return folder


def random_mask_lora(model: Path, rank: int, seed: int = 0) -> MaskLoraWeights:
    """Deltas on every linear layer of a tiny model's decoder: A and B random, alpha twice the rank."""
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = MaskLora.for_model(base, rank, alpha=2 * rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for b in lora.lora_b:
        b.data.normal_(std=0.5 / rank**0.5, generator=generator)
    return lora.weights(base)

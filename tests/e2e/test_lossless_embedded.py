"""fp32, SmolLM2-135M-Instruct and its adapter: 300 greedy requests, all of plain vLLM's tokens.

At once: 16 requests in a step, prompts in chunks of a 256-token budget, a KV cache so small that
requests are preempted, prefix caching with prefixes in common. 16 rows a request, so that 16 blocks
fill the budget of a step.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from e2e.engines import NEAR_TIE, differences, generate, metric, run
from e2e.inspection import recorded_steps
from testbed.engines import engine, idle_threads
from transformers import AutoTokenizer
from vllm import SamplingParams

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "tests" / "data" / "mt_bench_questions.jsonl"
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"
BITA = {"model": str(ADAPTER), "num_speculative_tokens": 15}  # the adapter's trees of 16 rows
NUM_REQUESTS = 300
OPTIONS = {
    "max_model_len": 1152,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 44,
}


def make_requests(model: Path) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 5-900 tokens, outputs of at most 1-200; mostly short, for the time they take."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(11)
    questions = [json.loads(line)["turns"] for line in QUESTIONS.read_text().splitlines()]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turns[0]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for turns in questions
    ]
    chats.sort(key=len)
    chats = [chat for chat in chats if len(chat) <= 900]
    code = tokenizer(Path(np.__file__).with_name("matlib.py").read_text())["input_ids"]
    repeated = tokenizer("The cat sat on the mat. The dog sat on the log. " * 100)["input_ids"]

    prompts = chats[:60]
    while len(prompts) < NUM_REQUESTS:
        length = int(5 * 16 ** rng.random())
        start = int(rng.integers(0, len(code) - length))
        prompts.append(
            [
                rng.integers(17, 49152, length).tolist(),
                code[start : start + length],
                repeated[:length],
            ][len(prompts) % 3]
        )
    prompts[-6:] = [code[:900], code[:640], repeated[:450], repeated[:5], code[:300], code[:5]]
    lengths = (60 ** rng.random(NUM_REQUESTS)).astype(int)
    lengths[-6:] = 1, 100, 30, 120, 200, 150
    requests = [
        (prompt, SamplingParams(temperature=0, max_tokens=int(n), ignore_eos=i % 5 == 0))
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return [requests[i] for i in rng.permutation(NUM_REQUESTS)]


@pytest.mark.slow
def test_300_requests_get_plain_vllms_tokens(embedded_model, record_property):
    requests = make_requests(embedded_model)
    assert {min(len(p) for p, _ in requests), max(len(p) for p, _ in requests)} == {5, 900}
    threads = idle_threads()
    plain = run(embedded_model, requests, threads=threads)
    with (
        recorded_steps() as steps,
        engine(embedded_model, BITA, threads=threads, **OPTIONS) as llm,
    ):
        before = metric(llm, "num_preemptions"), metric(llm, "prefix_cache_hits")
        outputs = generate(llm, requests)
        preempted = metric(llm, "num_preemptions") - before[0]
        hits = metric(llm, "prefix_cache_hits") - before[1]

    different = differences(
        lambda: engine(embedded_model, threads=threads), requests, plain, outputs
    )
    emitted = Counter(len(step.tokens) for step in steps if step.line >= 0)
    figures = {
        "identical": f"{NUM_REQUESTS - len(different)} of {NUM_REQUESTS}",
        "prompt tokens": sum(len(prompt) for prompt, _ in requests),
        "output tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "preemptions": preempted,
        "prefix cache hits": hits,
        "steps by accepted length": dict(emitted),
    }
    for name, figure in figures.items():
        record_property(name, figure)
    print(figures)
    assert all(d.gap < NEAR_TIE for d in different)
    assert preempted > 0
    assert hits > 0
    assert len(emitted) > 1

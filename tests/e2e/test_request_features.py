"""fp32: what a request may ask for works exactly as in plain vLLM, with drafts accepted or not; on both runners.

All cases run in one mixed batch and each alone: with an oracle's drafts (walks end at every node of the tree), with a
random adapter's, and with copies alone, without an adapter. Outputs are compared whole. On the V2 runner
(`--runner gpu`), where a step takes a good tenth of a second, outputs are shorter and only a few cases run alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from e2e.engines import Request, generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
VOCAB_SIZE = 512
EOS = 1
SEEDED = {"temperature": 1.0, "seed": 7}
PROMPT_LENGTHS = (9, 20, 60)  # the last fills a KV block, and is prefilled in two chunks
MAX_TOKENS = 12 if ON_GPU_RUNNER else 24
TREE = "2,1" if ON_GPU_RUNNER else "4,3,2"
# Sampling sees no layers and no heads; Triton's interpreter takes its time for each.
SMALL = {"num_hidden_layers": 1, "num_key_value_heads": 1} if ON_GPU_RUNNER else {}
DRAFTS = ("oracle", "random adapter") if ON_GPU_RUNNER else ("oracle", "random adapter", "copies")
OPTIONS = {
    "max_num_seqs": 6 if ON_GPU_RUNNER else 16,
    "long_prefill_token_threshold": 48,
}


def cases(seen: list[int], texts: list[str], words: list[str]) -> dict[str, dict]:
    """Sampling parameters by name, from what greedy plain vLLM says: its tokens, their texts, words of two of them."""
    return {
        "greedy": {},
        "seed": SEEDED,
        "seed, temperature 0.5": {**SEEDED, "temperature": 0.5},
        "seed, top_k": {**SEEDED, "top_k": 5},
        "seed, top_p": {**SEEDED, "top_p": 0.8},
        "seed, min_p": {**SEEDED, "min_p": 0.1},
        "seed, all filters": {**SEEDED, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        "seed, n=2": {**SEEDED, "n": 2},
        "logit_bias": {"logit_bias": {seen[5]: -100.0, 77: 4.0}},
        "allowed_token_ids": {"allowed_token_ids": list(range(10, 200))},
        "bad_words": {"bad_words": words[:2]},
        "min_tokens": {"min_tokens": 10, "stop_token_ids": [seen[6]]},
        "repetition_detection": {
            "logit_bias": {77: 100.0},
            "repetition_detection": RepetitionDetectionParams(max_pattern_size=1, min_count=7),
        },
        "stop string": {"stop": [texts[8] + texts[9]]},
        "stop string kept": {"stop": [texts[8]], "include_stop_str_in_output": True},
        "stop_token_ids": {"stop_token_ids": [seen[10]]},
        "EOS": {"logit_bias": {EOS: 7.0}, "ignore_eos": False},
        "EOS ignored": {"logit_bias": {EOS: 7.0}, "ignore_eos": True},
        "presence_penalty": {"presence_penalty": -2.0},
        "frequency_penalty": {"frequency_penalty": 2.0, "logit_bias": {77: 12.0}},
        "repetition_penalty": {"repetition_penalty": 1.4},
        "seed, all penalties": {
            **SEEDED,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
        },
        "logprobs": {"logprobs": 5},
        "logprobs=0": {"logprobs": 0},
        "seed, logprobs": {**SEEDED, "logprobs": 3},
        "logprob_token_ids": {"logprob_token_ids": [5, 77, 300]},
        "prompt_logprobs": {"prompt_logprobs": 2},
        "logprobs and penalty": {"logprobs": 3, "presence_penalty": -2.0},
        "max_tokens=1": {"max_tokens": 1},
        "no detokenizing": {"detokenize": False},
    }


NAMES = list(cases([0] * 30, [""] * 30, []))
LIKE_GREEDY = {
    "greedy", "stop string", "stop string kept", "stop_token_ids", "logprobs", "logprobs=0",
    "logprob_token_ids", "prompt_logprobs", "max_tokens=1", "no detokenizing",
}  # fmt: skip
# On the V2 runner: sampling with nothing to do, with filters, along the walk; logprobs of both.
ALONE = {"greedy", "seed, all filters", "bad_words", "logprobs", "logprobs and penalty"}
RUNS = [(name, "mixed") for name in NAMES] + [
    (name, "alone") for name in NAMES if name in ALONE or not ON_GPU_RUNNER
]


def prompt_of(name: str) -> list[int]:
    i = NAMES.index(name) % 3
    return np.random.default_rng(i).integers(3, VOCAB_SIZE, PROMPT_LENGTHS[i]).tolist()


def without_stops(params: dict) -> dict:
    """What the model would say beyond its stops: the oracle drafts it, the engine must not emit it."""
    stops = ("stop", "include_stop_str_in_output", "repetition_detection")
    rest = {k: v for k, v in params.items() if k not in stops}
    return {**rest, "ignore_eos": True, "max_tokens": params.get("max_tokens", MAX_TOKENS) + 8}


def make(params: dict) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **params})


def all_at_once(llm: LLM, requests: dict[str, Request]) -> dict[str, RequestOutput]:
    """Outputs by case. On the V1 runner one waits for the others: vLLM gives its token ids to the whole batch."""
    late = [] if ON_GPU_RUNNER else ["logprob_token_ids"]
    first = [name for name in requests if name not in late]
    batches = [first, late] if late else [first]
    return {
        name: output
        for names in batches
        for name, output in zip(
            names, generate(llm, [requests[name] for name in names]), strict=True
        )
    }


class Arms:
    """Outputs of plain vLLM and of bita, by case; in both, the prompts are in the prefix cache."""

    def __init__(self, model, adapter) -> None:
        prompts = {name: prompt_of(name) for name in NAMES}
        first = [(prompts[name], make({"ignore_eos": True})) for name in NAMES[:3]]
        with engine(model, **OPTIONS) as llm:
            tokenizer = llm.get_tokenizer()
            encode = partial(tokenizer.encode, add_special_tokens=False)
            self.greedy = {
                tuple(prompt): list(output.outputs[0].token_ids)
                for (prompt, _), output in zip(first, generate(llm, first), strict=True)
            }

            def params_of(name: str) -> dict:
                seen = self.greedy[tuple(prompts[name])]
                texts = [tokenizer.decode([token]) for token in seen]
                words = {tokenizer.decode(list(pair)): pair for pair in pairwise(seen)}
                readable = [w for w in words if encode(w) == list(words[w]) and w == w.strip()]
                return cases(seen, texts, readable)[name]

            self.requests = {name: (prompts[name], make(params_of(name))) for name in NAMES}
            self.plain = all_at_once(llm, self.requests)
            ended = [n for n, o in self.plain.items() if o.outputs[0].finish_reason != "length"]
            beyond = [
                (prompts[name], make(without_stops(params_of(name))))
                for name in ["greedy", "max_tokens=1", *ended]
            ]
            self.continuation = known([*self.plain.values(), *generate(llm, beyond)])
            self.second_turns = [
                (prompts[name] + list(self.plain[name].outputs[0].token_ids) + [5, 6], make({}))
                for name in NAMES
                if len(prompts[name]) == PROMPT_LENGTHS[2] and name.startswith("seed")
            ]
            self.plain_second_turns = generate(llm, self.second_turns)

        self.bita: dict[tuple[str, str], dict[str, RequestOutput]] = {}
        self.bita_second_turns: dict[str, list[RequestOutput]] = {}
        self.accepted: dict[str, float] = {}
        for drafts in DRAFTS:
            bita = {"model": str(adapter), "tree": TREE}
            if drafts == "copies":
                bita = {"num_speculative_tokens": 4}
            source = oracle(self.continuation) if drafts == "oracle" else nullcontext()
            with recorded_steps() as steps, source, engine(model, bita, **OPTIONS) as llm:
                generate(llm, first)
                self.bita[drafts, "mixed"] = all_at_once(llm, self.requests)
                self.bita_second_turns[drafts] = generate(llm, self.second_turns)
                self.bita[drafts, "alone"] = {
                    name: generate(llm, [self.requests[name]])[0]
                    for name, company in RUNS
                    if company == "alone"
                }
            lengths = [len(step.tokens) for step in steps if step.line >= 0]
            self.accepted[drafts] = 1 - len(lengths) / sum(lengths)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", vocab_size=VOCAB_SIZE, **SMALL)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return make_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def arms(model, adapter):
    return Arms(model, adapter)


def check_logprobs(plain: list | None, bita: list | None) -> None:
    """The same tokens and ranks at every position, logprobs within 1e-4."""
    assert (plain is None) == (bita is None)
    for a, b in zip(plain or [], bita or [], strict=True):
        assert (a is None) == (b is None)  # the first prompt token has none
        if a is not None:
            assert {t: (p.rank, p.decoded_token) for t, p in a.items()} == {
                t: (p.rank, p.decoded_token) for t, p in b.items()
            }
            assert [b[t].logprob for t in a] == pytest.approx(
                [p.logprob for p in a.values()], abs=1e-4
            )


def check_output(plain: RequestOutput, bita: RequestOutput) -> None:
    assert bita.num_cached_tokens == plain.num_cached_tokens
    assert len(bita.outputs) == len(plain.outputs)
    for a, b in zip(plain.outputs, bita.outputs, strict=True):
        assert list(b.token_ids) == list(a.token_ids)
        assert b.text == a.text
        assert (b.finish_reason, b.stop_reason) == (a.finish_reason, a.stop_reason)
        assert b.cumulative_logprob == (
            a.cumulative_logprob
            if a.cumulative_logprob is None
            else pytest.approx(a.cumulative_logprob, abs=1e-3)
        )
        check_logprobs(a.logprobs, b.logprobs)
    check_logprobs(plain.prompt_logprobs, bita.prompt_logprobs)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize(("name", "company"), RUNS)
def test_output_equals_plain_vllm(arms, name, company, drafts):
    check_output(arms.plain[name], arms.bita[drafts, company][name])


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_second_turn_reads_what_blocks_wrote(arms, drafts):
    """The first turn's answer is in the prefix cache as far as it fills a KV block: accepted rows, moved."""
    for plain, bita in zip(arms.plain_second_turns, arms.bita_second_turns[drafts], strict=True):
        assert plain.num_cached_tokens > PROMPT_LENGTHS[2]
        check_output(plain, bita)


def test_cases_do_what_their_names_say(arms):
    """Each parameter has an effect, so that equality above says something."""
    reasons = {n: o.outputs[0].finish_reason for n, o in arms.plain.items()}
    stopped = {n for n, reason in reasons.items() if reason == "stop"}
    assert {"stop string", "stop string kept", "stop_token_ids", "EOS"} <= stopped
    assert reasons["repetition_detection"] == "repetition"
    assert EOS in arms.plain["EOS ignored"].outputs[0].token_ids[:-1]
    for name in NAMES:
        tokens = list(arms.plain[name].outputs[0].token_ids)
        greedy = arms.greedy[tuple(arms.plain[name].prompt_token_ids)]
        assert (tokens == greedy[: len(tokens)]) == (name in LIKE_GREEDY), name
    assert 1 < arms.plain["frequency_penalty"].outputs[0].token_ids.count(77) < MAX_TOKENS
    assert len(arms.plain["min_tokens"].outputs[0].token_ids) >= 10
    assert len(arms.plain["prompt_logprobs"].prompt_logprobs) == PROMPT_LENGTHS[2]
    assert len(arms.plain["logprob_token_ids"].outputs[0].logprobs[0]) >= 3
    assert {o.num_cached_tokens for o in arms.plain.values()} == {0, 32}
    print(f"accepted drafts: {arms.accepted}")
    assert arms.accepted["oracle"] > 0.3
    assert arms.accepted.get("copies", 1) > 0.1


def test_aborted_requests_leave_the_others_alone(arms, model, adapter):
    """Half of the batch is aborted after a few steps; its KV blocks come back."""
    bita = {"model": str(adapter), "tree": TREE}
    names = [n for n in NAMES if arms.requests[n][1].n == 1][: 2 * OPTIONS["max_num_seqs"]]
    finished = {}
    with oracle(arms.continuation), engine(model, bita, **OPTIONS) as llm:
        core = llm.llm_engine
        for name in names:
            prompt, params = arms.requests[name]
            core.add_request(name, {"prompt_token_ids": prompt}, params.clone())
        for step in range(500):
            if step == 4:
                core.abort_request(names[::2])
            finished.update({o.request_id: o for o in core.step() if o.finished})
            if not core.has_unfinished_requests():
                break
        pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
    for name in names[1::2]:
        expected = list(arms.plain[name].outputs[0].token_ids)
        assert list(finished[name].outputs[0].token_ids) == expected

"""fp32: what a request may ask for works exactly as in plain vLLM, with drafts accepted or not.

All cases run in one mixed batch and each alone, with an oracle's drafts (walks end at every node of
the tree) and with a random adapter's. Outputs are compared whole.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from e2e.engines import engine, generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from vllm import RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError

VOCAB_SIZE = 512
EOS = 1
SEEDED = {"temperature": 1.0, "seed": 7}


def cases(seen: list[int], texts: list[str]) -> dict[str, dict]:
    """Sampling parameters by name; `seen` and `texts` are what greedy plain vLLM says."""
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
        "bad_words": {"bad_words": [texts[4], texts[9]]},
        "min_tokens": {"min_tokens": 12, "stop_token_ids": [seen[6]]},
        "stop string": {"stop": [texts[8] + texts[9]]},
        "stop string kept": {"stop": [texts[8]], "include_stop_str_in_output": True},
        "stop_token_ids": {"stop_token_ids": [seen[10]]},
        "EOS": {"logit_bias": {EOS: 7.0}, "ignore_eos": False},
        "EOS ignored": {"logit_bias": {EOS: 7.0}, "ignore_eos": True},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": 1.2},
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
        "prompt_logprobs": {"prompt_logprobs": 2},
        "logprobs and penalty": {"logprobs": 3, "presence_penalty": 1.0},
        "max_tokens=1": {"max_tokens": 1},
        "no detokenizing": {"detokenize": False},
    }


NAMES = list(cases([0] * 30, [""] * 30))


def prompt_of(name: str) -> list[int]:
    rng = np.random.default_rng(NAMES.index(name) % 3)
    return rng.integers(3, VOCAB_SIZE, 9).tolist()


def without_stops(params: dict) -> dict:
    """What the model would say beyond its stops: the oracle drafts it, the engine must not emit it."""
    rest = {k: v for k, v in params.items() if k not in ("stop", "include_stop_str_in_output")}
    return {**rest, "ignore_eos": True, "max_tokens": params.get("max_tokens", 24) + 8}


def make(params: dict) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, **params})


class Arms:
    """Outputs of plain vLLM and of bita, by case."""

    def __init__(self, model, adapter) -> None:
        greedy = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
        with engine(model) as llm:
            tokenizer = llm.get_tokenizer()
            prompts = {name: prompt_of(name) for name in NAMES}
            said = {
                tuple(prompt): list(generate(llm, [(prompt, greedy)])[0].outputs[0].token_ids)
                for prompt in prompts.values()
            }

            def params_of(name: str) -> dict:
                seen = said[tuple(prompts[name])]
                return cases(seen, [tokenizer.decode([token]) for token in seen])[name]

            self.requests = {name: (prompts[name], make(params_of(name))) for name in NAMES}
            self.plain = dict(zip(NAMES, generate(llm, list(self.requests.values())), strict=True))
            beyond = [(prompts[n], make(without_stops(params_of(n)))) for n in NAMES]
            continuation = known([*generate(llm, beyond), *self.plain.values()])

        self.bita: dict[tuple[str, str], dict[str, RequestOutput]] = {}
        self.accepted: dict[str, int] = {}
        bita = {"model": str(adapter), "tree": "4,3,2"}
        for drafts in ("oracle", "random adapter"):
            source = oracle(continuation) if drafts == "oracle" else nullcontext()
            with recorded_steps() as steps, source, engine(model, bita) as llm:
                mixed = generate(llm, list(self.requests.values()))
                self.bita[drafts, "mixed"] = dict(zip(NAMES, mixed, strict=True))
                self.bita[drafts, "alone"] = {
                    name: generate(llm, [request])[0] for name, request in self.requests.items()
                }
            self.accepted[drafts] = sum(len(step.tokens) - 1 for step in steps)


@pytest.fixture(scope="module")
def arms(tiny_model, tmp_path_factory):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    return Arms(model, make_adapter(model, tmp_path_factory.mktemp("adapter")))


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


@pytest.mark.parametrize("drafts", ["oracle", "random adapter"])
@pytest.mark.parametrize("company", ["mixed", "alone"])
@pytest.mark.parametrize("name", NAMES)
def test_output_equals_plain_vllm(arms, name, company, drafts):
    plain, bita = arms.plain[name], arms.bita[drafts, company][name]
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


def test_cases_do_what_their_names_say(arms):
    """Each parameter has an effect, so that equality above says something."""
    reasons = {n: o.outputs[0].finish_reason for n, o in arms.plain.items()}
    stopped = {n for n, reason in reasons.items() if reason == "stop"}
    assert {"stop string", "stop string kept", "stop_token_ids", "EOS"} <= stopped
    assert EOS in arms.plain["EOS ignored"].outputs[0].token_ids[:-1]
    greedy = {
        tuple(o.prompt_token_ids): list(o.outputs[0].token_ids)
        for n, o in arms.plain.items()
        if n in ("greedy", "logprobs", "logprobs=0", "prompt_logprobs", "no detokenizing")
    }
    for name in ("bad_words", "presence_penalty", "repetition_penalty", "allowed_token_ids"):
        output = arms.plain[name]
        assert greedy.get(tuple(output.prompt_token_ids)) != list(output.outputs[0].token_ids)
    print(f"accepted drafts: {arms.accepted}")
    assert arms.accepted["oracle"] > 500


def test_aborted_requests_leave_the_others_alone(arms, tiny_model, tmp_path):
    """Half of the batch is aborted after a few steps; its KV blocks come back."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    bita = {"model": str(make_adapter(model, tmp_path)), "tree": "4,3,2"}
    names = [n for n in NAMES if arms.requests[n][1].n == 1]
    finished = {}
    with oracle(known(arms.plain.values())), engine(model, bita) as llm:
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


def test_thinking_budget_is_refused_in_a_sentence(tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    bita = {"model": str(make_adapter(model, tmp_path)), "tree": "2,1"}
    params = SamplingParams(thinking_token_budget=4)
    with engine(model, bita) as llm:
        with pytest.raises(
            VLLMValidationError, match=r"thinking_token_budget.* is not supported"
        ) as error:
            generate(llm, [([5, 6, 7], params)])
        assert "\n" not in str(error.value)
        after = generate(llm, [([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))])
        assert len(after[0].outputs[0].token_ids) == 3  # the engine goes on

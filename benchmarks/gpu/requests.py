"""What the suite asks engines for: kinds of requests, and how they come in. Runs in the engine's process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from typing import Any

KINDS = (
    "logprobs", "greedy", "prefix cache", "mixed", "seeded", "choices", "regex", "json",
    "penalties", "top-p",
)  # fmt: skip
# Greedy on the same prompts, so plain vLLM's logprobs of one say how close a call another's difference was.
SAME_AS_LOGPROBS = ("greedy", "prefix cache", "mixed")
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["north", "south", "east"]},
        "code": {"type": "string", "pattern": "^[a-c]{1,4}$"},
        "sizes": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 1, "maxItems": 3},
        "open": {"type": "boolean"},
    },
    "required": ["place", "code", "sizes", "open"],
    "additionalProperties": False,
}
_names = count()


def sampling(kind: str, i: int, max_tokens: int) -> Any:
    """vLLM's SamplingParams of request `i` of a kind."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structures = {
        "choices": {"choice": ["left", "right", "neither"]},
        "regex": {"regex": "(ab|c)+d"},
    }
    structures["json"] = {"json": SCHEMA}
    options: dict[str, Any] = {"temperature": 0.0}
    if kind in structures:
        options["structured_outputs"] = StructuredOutputsParams(**structures[kind])
        max_tokens = max(max_tokens, 24)
    else:
        options["ignore_eos"] = True
    if kind == "logprobs":
        options["logprobs"] = 5
    if kind == "seeded" or (kind in structures and i % 2):
        options |= {"temperature": 0.8, "seed": i}
    if kind == "penalties":
        options |= {"temperature": 0.7, "top_p": 0.9, "seed": i, "presence_penalty": 0.5}
        options["frequency_penalty"] = 0.3
    if kind == "top-p":
        options |= {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": i}
    return SamplingParams(max_tokens=max_tokens, **options)


def answer(llm: Any, kind: str, prompts: Sequence[list[int]], max_tokens: int) -> dict[str, Any]:
    """What an engine makes of all prompts: tokens, and where asked for the logprobs of its own and best tokens.

    Mixed load: every second step another request comes in, every other one with a long prompt, so that
    chunks of prefill run next to blocks.
    """
    engine, begun = llm.llm_engine, time.perf_counter()
    waiting = [
        (
            str(next(_names)),
            prompt * (8 if kind == "mixed" and i % 2 else 1),
            sampling(kind, i, max_tokens),
        )
        for i, prompt in enumerate(prompts)
    ]
    names = [name for name, *_ in waiting]
    done: dict[str, Any] = {}
    for step in count():
        while waiting and (kind != "mixed" or step % 2 == 0):
            name, prompt, params = waiting.pop(0)
            room = engine.model_config.max_model_len - params.max_tokens - 1
            engine.add_request(name, {"prompt_token_ids": prompt[:room]}, params)
            if kind == "mixed":
                break
        done |= {output.request_id: output for output in engine.step() if output.finished}
        if not waiting and not engine.has_unfinished_requests():
            break
    outputs = [done[name] for name in names]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [logprobs_of(output.outputs[0]) for output in outputs],
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "seconds": round(time.perf_counter() - begun, 2),
    }


def logprobs_of(completion: Any) -> list[tuple[float, float]]:
    """(logprob of the token, gap of the two best) at every place; empty if not asked for."""
    found = []
    places = zip(completion.token_ids, completion.logprobs or [], strict=False)
    for token, top in places:
        best = sorted((entry.logprob for entry in top.values()), reverse=True)
        found.append((top[token].logprob, best[0] - best[1]))
    return found


def serve(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    concurrency: int = 0,
    arrivals: Sequence[float] = (),
    ignore_eos: bool = True,
) -> dict[str, Any]:
    """Serve all prompts greedily: `concurrency` in flight, or each at its time of arrival in seconds.

    Rates count everything from the first request to the last token. `step_ms` leaves out steps in which a
    request came in; `accepted_length` leaves out the token of a request's prefill.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine = llm.llm_engine
    names = {str(next(_names)): i for i in range(len(prompts))}
    waiting, in_flight = list(names), 0
    outputs: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]  # of arrival, then of every emission
    steps: list[float] = []
    begun = now = time.perf_counter()
    while waiting or in_flight:
        came_in = False
        while waiting:
            i = names[waiting[0]]
            due = begun + arrivals[i] if arrivals else begun
            if (arrivals and now < due) or (not arrivals and in_flight >= concurrency):
                break
            engine.add_request(waiting.pop(0), {"prompt_token_ids": prompts[i]}, params)
            times[i].append(due if arrivals else time.perf_counter())
            in_flight, came_in = in_flight + 1, True
        if not in_flight:
            time.sleep(0.0005)
            now = time.perf_counter()
            continue
        last, emitted = now, engine.step()
        now = time.perf_counter()
        if emitted and not came_in:
            steps.append(now - last)
        for output in emitted:
            i, tokens = names[output.request_id], output.outputs[0].token_ids
            if tokens:
                outputs[i] += tokens
                times[i].append(now)
            in_flight -= output.finished
    return {"outputs": outputs, **figures(outputs, times, steps, now - begun)}


def figures(
    outputs: Sequence[Sequence[int]],
    times: Sequence[Sequence[float]],
    steps: Sequence[float],
    seconds: float,
) -> dict[str, float]:
    """Rate, accepted length, and medians of step, time to first token and time a further token, in ms."""
    from statistics import median

    tokens, emissions = sum(map(len, outputs)), sum(len(each) - 1 for each in times)
    later = [
        (each[-1] - each[1]) / (len(output) - 1)
        for each, output in zip(times, outputs, strict=True)
        if len(output) > 1
    ]
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "accepted_length": round((tokens - len(outputs)) / max(emissions - len(outputs), 1), 3),
        "step_ms": round(1e3 * median(steps), 3) if steps else float("nan"),
        "ttft_ms": round(1e3 * median(each[1] - each[0] for each in times), 2),
        "tpot_ms": round(1e3 * median(later), 3) if later else float("nan"),
    }

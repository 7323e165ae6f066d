"""Greedy answers of two servers: where they leave each other, and whether rounding excuses it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import httpx
from soak_client import ANSWER_TIMEOUT_S, Answer
from soak_requests import COMPARED, Request

# Each of plain vLLM's top two logits may be off by one unit in each of two engines (tests/e2e/test_bf16.py).
ROUNDING_UNITS = 2
FP32_NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Difference:
    """First token in which an answer differs, and the gap of plain vLLM's own top two logits there."""

    request: int
    position: int
    gap: float
    top: float

    def is_rounding(self, dtype: str) -> bool:
        """Whether the two tokens nearly tie; bf16 numbers near x are 2^(floor(log2 |x|) - 7) apart."""
        if dtype == "float32":
            return self.gap < FP32_NEAR_TIE
        return self.gap <= ROUNDING_UNITS * 2.0 ** (math.floor(math.log2(abs(self.top))) - 7)


def compared(requests: Sequence[Request]) -> list[int]:
    """Places of the requests whose tokens must be plain vLLM's."""
    return [place for place, request in enumerate(requests) if request.kind in COMPARED]


def differences(
    plain_url: str, requests: Sequence[Request], plain: Sequence[Answer], bita: Sequence[Answer]
) -> list[Difference]:
    """One for each greedy request whose tokens differ; plain's server, with raw logits, is asked for the gaps."""
    found = []
    for place in compared(requests):
        if plain[place].fault or bita[place].fault:
            continue
        (expected,), (tokens,) = plain[place].tokens, bita[place].tokens
        if expected != tokens:
            pairs = zip_longest(expected, tokens)
            position = next(n for n, (x, y) in enumerate(pairs) if x != y)
            body = requests[place].body
            body = {
                "model": body["model"],
                "prompt": body["prompt"] + expected[:position],
                "temperature": 0.0,
                "max_tokens": 1,
                "logprobs": 2,
                "ignore_eos": True,
            }
            response = httpx.post(
                f"{plain_url}/v1/completions", json=body, timeout=ANSWER_TIMEOUT_S
            )
            response.raise_for_status()
            (logits,) = response.json()["choices"][0]["logprobs"]["top_logprobs"]
            first, second = sorted(logits.values())[:-3:-1]
            found.append(Difference(place, position, first - second, first))
    return found

"""The mixed requests of `soak.py`: what clients of a busy server send, seeded."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from serving_prompts import as_chat, long_context, mt_bench

# Of twenty requests, in random order.
MIX = {
    "greedy": 6,
    "sampled": 3,
    "aborted": 3,  # the client leaves after some chunks
    "disconnected": 2,  # the client leaves before the first one
    "structured": 2,
    "tools": 1,
    "four answers": 1,
    "long prompt": 1,
    "logprobs": 1,
}
COMPARED = ("greedy", "long prompt", "logprobs")  # greedy, and nothing but the logits chooses
CHUNKS_BEFORE_ABORT = 3
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
JSON_TOKENS = 96  # enough for the longest object of SCHEMA, with some white space


@dataclass(frozen=True)
class Request:
    """One request: where it goes, and what is sent."""

    kind: str
    path: str
    body: dict[str, Any]


def requests(
    number: int, tokenizer: Any, model: str, long_prompt: int, max_tokens: int, seed: int
) -> list[Request]:
    """`number` requests; the same ones for the same arguments. `long_prompt` is in tokens."""
    rng = np.random.default_rng(seed)
    questions = mt_bench()
    long_questions = long_context(long_prompt, tokenizer)
    twenty = [kind for kind, count in MIX.items() for _ in range(count)]
    kinds = [kind for _ in range(-(-number // len(twenty))) for kind in rng.permutation(twenty)]
    made = []
    for i, kind in enumerate(kinds[:number]):
        place = int(rng.integers(len(questions)))
        text = (long_questions if kind == "long prompt" else questions)[place]
        tokens = int(rng.integers(max_tokens // 4, max_tokens + 1))
        made.append(Request(str(kind), *body_of(kind, text, tokens, i, tokenizer, model)))
    return made


def body_of(
    kind: str, text: str, max_tokens: int, number: int, tokenizer: Any, model: str
) -> tuple[str, dict[str, Any]]:
    """Path and body of one request."""
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0}
    if kind in ("structured", "tools"):
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": JSON_TOKENS}
        if kind == "tools":
            body |= {"tools": [TOOL]}
            body |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
        else:
            wanted = {"name": "weather", "schema": SCHEMA}
            body |= {"response_format": {"type": "json_schema", "json_schema": wanted}}
        return "/v1/chat/completions", body
    body |= {"prompt": as_chat(text, tokenizer), "stream": True, "return_token_ids": True}
    if kind in ("sampled", "four answers"):
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": number}
        body |= {"n": 4} if kind == "four answers" else {"presence_penalty": 0.2}
    elif kind == "logprobs":
        body |= {"logprobs": 3}
    elif kind in ("aborted", "disconnected"):
        body |= {"max_tokens": 4 * max_tokens, "ignore_eos": True}
    return "/v1/completions", body


def follows_schema(text: str) -> bool:
    """Whether the text is an object of SCHEMA."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and found.keys() == SCHEMA["properties"].keys()
        and found["city"] in SCHEMA["properties"]["city"]["enum"]
        and isinstance(found["sunny"], bool)
    )


def count_by_kind(made: list[Request]) -> dict[str, int]:
    return dict(Counter(request.kind for request in made))

"""Clients of `soak.py`: each sends a request, stays or leaves as its kind says, and keeps what it got."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from soak_requests import CHUNKS_BEFORE_ABORT, Request, follows_schema

ANSWER_TIMEOUT_S = 300  # ends a hang; a busy machine takes seconds


@dataclass
class Answer:
    """Tokens of each choice, and what is wrong with the answer, if anything is."""

    tokens: list[list[int]] = field(default_factory=list)
    fault: str = ""


async def send_all(
    url: str, requests: Iterable[Request], clients: int, answered: Callable[[], object]
) -> list[Answer]:
    """Answers in the order of the requests; `clients` requests are in flight. `answered` is called after each."""
    waiting = list(enumerate(requests))
    answers = [Answer() for _ in waiting]
    waiting.reverse()
    limits = httpx.Limits(max_connections=clients)

    async def client(connections: httpx.AsyncClient) -> None:
        while waiting:
            place, request = waiting.pop()
            try:
                answers[place] = await send(connections, request)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                answers[place].fault = f"{type(error).__name__}: {error}"
            answered()

    async with httpx.AsyncClient(
        base_url=url, timeout=ANSWER_TIMEOUT_S, limits=limits
    ) as connections:
        await asyncio.gather(*(client(connections) for _ in range(clients)))
    return answers


async def send(connections: httpx.AsyncClient, request: Request) -> Answer:
    """Raises httpx.HTTPError, OSError; ValueError or KeyError where the answer is not as the API says."""
    if request.kind == "disconnected":
        return await disconnect(str(connections.base_url), request)
    if request.body.get("stream"):
        return await stream(connections, request)
    response = await connections.post(request.path, json=request.body)
    response.raise_for_status()
    found = response.json()
    message = found["choices"][0]["message"]
    if request.kind == "tools":  # what a call holds is the parser's
        return Answer(fault="" if message["tool_calls"] else "calls no tool")
    # JSON may have white space without end.
    complete = found["usage"]["completion_tokens"] < request.body["max_tokens"]
    if complete and not follows_schema(message["content"]):
        return Answer(fault=f"does not follow its schema: {message['content']!r}")
    return Answer()


async def stream(connections: httpx.AsyncClient, request: Request) -> Answer:
    """Read chunks to the end, or leave in between."""
    answer = Answer([[] for _ in range(request.body.get("n", 1))])
    chunks, done = 0, False
    async with connections.stream("POST", request.path, json=request.body) as response:
        if response.status_code != 200:
            return Answer(fault=f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return Answer(fault=str(chunk["error"]))
            for choice in chunk["choices"]:
                answer.tokens[choice["index"]] += choice["token_ids"] or []
            chunks += 1
            if request.kind == "aborted" and chunks == CHUNKS_BEFORE_ABORT:
                return answer
    most = request.body["max_tokens"]
    if not done:
        answer.fault = "the stream broke off"
    elif not all(0 < len(tokens) <= most for tokens in answer.tokens):
        answer.fault = f"{[len(tokens) for tokens in answer.tokens]} tokens, asked for {most}"
    return answer


async def disconnect(url: str, request: Request) -> Answer:
    """Send the whole request and cut the connection, without reading."""
    place = urlsplit(url)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    body = json.dumps(request.body).encode()
    head = f"POST {request.path} HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    writer.transport.abort()
    return Answer()

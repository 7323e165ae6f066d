"""One client, then more up to 64, then fewer: a real server passes through every width of its ladder and back."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from e2e.engines import NEAR_TIE, differences, make_adapter, run
from e2e.servers import Server, parse_metrics, running_server
from testbed.engines import ON_GPU_RUNNER, engine
from tree_tools import sets_of_one
from vllm import SamplingParams

from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU_RUNNER, reason="a server process of its own, on the CPU runner"),
]

VOCAB_SIZE = 64
# Large enough that a step takes longer than the front end needs for its chunks: else a chunk holds many steps.
MODEL_SIZE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
CLIENTS = 64
# Every width drafts to a depth of its own, which the server's metrics tell: that is how it is seen.
DEPTH_3 = Template.from_widths([3, 2, 1], 3)
DEPTH_2 = Template.from_widths([3, 2], 2)
DEPTH_1 = Template.from_widths([2], 1)
LADDER = Ladder(
    sets_of_one([DEPTH_1, DEPTH_2, DEPTH_3]),
    [
        (1, 2, DEPTH_3.width),
        (3, 8, 0),
        (9, 24, DEPTH_2.width),
        (25, CLIENTS, DEPTH_1.width),
    ],
)
DEPTHS = [3, 0, 2, 1]  # by range of batch sizes
# Both ends of every width, where the ramp waits for samples however late the server gives them, and some between.
ENDS = {size for first, last, _ in LADDER.batch_sizes for size in (first, last)}
SIZES = sorted(ENDS | {5, 16, 44})
HOLD = 12  # chunks that the first client gets at each size: so many steps, or more
SAMPLE_EVERY = 4  # chunks
SAMPLES = 3  # at both ends of a width
MAX_TOKENS = 3500  # more than a client stays for, however slow the machine
# A step at a change of width costs what its rows cost, and no step has many more of these than one at the peak:
# 64 x 6 rows, against 24 x 18 and 2 x 28. Ten times a step at the peak is a stall, whatever the machine does.
STALL = 10
RAMP_TIMEOUT_S = 1800  # ends a hang: 40 s on an idle machine
PAUSE = 2.0  # seconds that a busy machine may take away from any process, or as many as it did elsewhere


@dataclass
class Answer:
    """What one client got."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # request sent, then each chunk; seconds

    @property
    def chunks(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True)
class Sample:
    """The server's metrics at one moment."""

    time: float
    running: int
    drafts: int
    drafted: int
    accepted: int


async def take_sample(client: httpx.AsyncClient) -> Sample:
    now = time.perf_counter()
    series = parse_metrics((await client.get("/metrics")).text)
    names = ["num_requests_running"]
    names += [f"spec_decode_num_{n}_total" for n in ("drafts", "draft_tokens", "accepted_tokens")]
    return Sample(now, *(int(sum(value for _, value in series[f"vllm:{n}"])) for n in names))


async def ask(
    client: httpx.AsyncClient, prompt: list[int], answer: Answer, heard: Callable
) -> None:
    """Stream an answer until cancelled; `heard` is called after every chunk."""
    request = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
    request |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer.times.append(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=request) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                answer.times.append(time.perf_counter())
                answer.tokens += choice["token_ids"] or []
                heard()
    pytest.fail("an answer was complete before its client left")


async def ramp(
    server: Server, prompts: list[list[int]]
) -> tuple[list[Answer], list[Sample], Sample]:
    """More clients from size to size, then fewer: the last to come leaves first, by closing its connection.

    All goes by the chunks that the first client gets, so a slow machine passes the same batch sizes.
    """
    answers = [Answer() for _ in prompts]
    samples: list[Sample] = []
    something = asyncio.Event()  # a chunk came: conditions are looked at again

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            something.clear()
            await something.wait()

    async def after(chunks: int) -> None:
        goal = answers[0].chunks + chunks
        await until(lambda: answers[0].chunks >= goal)

    async def stay(clients: int) -> None:
        before = len(samples)
        await after(HOLD)
        if clients in ENDS:
            await until(lambda: [s.running for s in samples[before:]].count(clients) >= SAMPLES)

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            samples.append(await take_sample(client))
            await after(SAMPLE_EVERY)

    limits = httpx.Limits(max_connections=CLIENTS + 1)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client,
        asyncio.TaskGroup() as group,  # a client that fails ends them all
    ):
        clients: list[asyncio.Task] = []
        for size in SIZES:
            for prompt, answer in [*zip(prompts, answers, strict=True)][len(clients) : size]:
                clients.append(group.create_task(ask(client, prompt, answer, something.set)))
            await until(lambda size=size: all(answer.chunks for answer in answers[:size]))
            if not samples:
                watcher = group.create_task(watch(client))
            await stay(size)
        for size in reversed(SIZES[:-1]):
            while len(clients) > size:
                clients.pop().cancel()
            await stay(size)
        watcher.cancel()
        clients.pop().cancel()
    async with httpx.AsyncClient(base_url=server.url) as client:
        while (last := await take_sample(client)).running:
            await asyncio.sleep(0.1)
    return answers, samples, last


def depths_seen(samples: list[Sample]) -> list[int | None]:
    """By range of batch sizes: median depth of a draft between two samples in the range; 0 without drafts."""
    seen: list[list[float]] = [[] for _ in LADDER.batch_sizes]
    for before, after in pairwise(samples):
        for depths, (first, last, _) in zip(seen, LADDER.batch_sizes, strict=True):
            if all(first <= sample.running <= last for sample in (before, after)):
                drafts = after.drafts - before.drafts
                depths.append((after.drafted - before.drafted) / drafts if drafts else 0.0)
    return [round(statistics.median(depths)) if depths else None for depths in seen]


def longest_gaps(gaps: list[tuple[float, float]], samples: list[Sample]) -> tuple[float, float]:
    """Seconds of the longest gap that meets a change of width, and of the longest that does not.

    The second says what this machine does to a process, with other jobs next to it.
    """
    first = np.array([first for first, _, _ in LADDER.batch_sizes])
    changes = [
        (before.time, after.time)
        for before, after in pairwise(samples)
        if np.sum(first <= before.running) != np.sum(first <= after.running)
    ]
    assert len(changes) >= 2 * (len(first) - 1), "up and down"
    begin, end = np.array(gaps).T
    meets = np.any([(begin < until) & (end > since) for since, until in changes], axis=0)
    return (end - begin)[meets].max(), (end - begin)[~meets].max()


def test_a_ramp_from_1_to_64_clients_and_back(tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=4096, **MODEL_SIZE)
    adapter = make_adapter(model, tmp_path / "adapter")
    LADDER.save(adapter / LADDER_FILE)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, VOCAB_SIZE, 1 + 3 * (i % 16)).tolist() for i in range(CLIENTS)]
    flags = ["--max-model-len", "4096", "--max-num-seqs", str(CLIENTS), "--block-size", "32"]
    flags += ["--kv-cache-memory-bytes", str(256 << 20)]
    config = {"method": "bita", "model": str(adapter), "copies": False}  # depths tell widths
    flags += ["--speculative-config", json.dumps(config)]
    with running_server(model, "tiny", flags, tmp_path) as server:
        answers, samples, last = asyncio.run(
            asyncio.wait_for(ramp(server, prompts), RAMP_TIMEOUT_S)
        )

    assert last.accepted > 0
    running = [sample.running for sample in samples]
    peak = running.index(CLIENTS)
    assert depths_seen(samples[: peak + 1]) == DEPTHS, "going up"
    assert depths_seen(samples[peak:]) == DEPTHS, "going down"

    at_peak = [sample.time for sample in samples if sample.running == CLIENTS]
    gaps = [gap for answer in answers for gap in pairwise(answer.times)]
    step = statistics.median(end - begin for begin, end in gaps if at_peak[0] <= end <= at_peak[-1])
    at_a_change, elsewhere = longest_gaps(gaps, samples)
    print(
        f"{len(answers[0].tokens)} tokens in {answers[0].chunks} chunks for the first client; "
        f"a step at the peak: {1e3 * step:.0f} ms; longest gap at a change of width: "
        f"{1e3 * at_a_change:.0f} ms, elsewhere: {1e3 * elsewhere:.0f} ms"
    )
    assert at_a_change < max(STALL * step, PAUSE, elsewhere)

    requests = [
        (prompt, SamplingParams(temperature=0, max_tokens=len(answer.tokens), ignore_eos=True))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    plain = run(model, requests, max_num_seqs=CLIENTS, max_model_len=4096)
    served = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=a.tokens)]) for a in answers]
    different = differences(lambda: engine(model, max_model_len=4096), requests, plain, served)
    assert all(difference.gap < NEAR_TIE for difference in different)

"""A server of `soak.py`: loaded leg by leg, and looked at when it is idle."""

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from soak_client import Answer, send_all
from soak_requests import Request
from testbed.server_process import ServerProcess

START_TIMEOUT_S = 1200  # the first start compiles
IDLE_TIMEOUT_S = 120  # ends a hang; a client that leaves is noticed within a step
ERROR_LINE = re.compile(r"\b(?:ERROR|CRITICAL) \d\d-\d\d ")


@dataclass(frozen=True)
class State:
    """An idle server after a leg."""

    requests: int  # so far
    seconds: float  # of the leg
    tokens: int  # generated in the leg, those of clients that left included
    drafted: int  # by depth, as vLLM's metrics count
    accepted: int
    preempted: int  # in the leg
    rss: dict[str, int]  # bytes, by process
    kv_usage: float
    containers: dict[str, int]


class SoakServer(ServerProcess):
    """`vllm serve` with a look into its engine."""

    def __init__(self, name: str, model: str | Path, flags: Sequence[str], log: Path) -> None:
        flags = [*flags, "--worker-extension-cls", "soak_worker.SoakWorker"]
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process computes and schedules
        }
        super().__init__(name, model, flags, log, env)

    def legs(
        self, requests: Sequence[Request], number: int, clients: int, answered: Callable[[], object]
    ) -> tuple[list[State], list[Answer]]:
        """Send the requests in `number` legs; the state after each, and all answers. Raises ServerError."""
        states: list[State] = []
        answers: list[Answer] = []
        ends = [len(requests) * (leg + 1) // number for leg in range(number)]
        before = self.counters()
        for end in ends:
            begin = time.perf_counter()
            answers += asyncio.run(
                send_all(self.url, requests[len(answers) : end], clients, answered)
            )
            engine = self.engine_when_idle(requests[0].body["model"])
            seconds = time.perf_counter() - begin
            after = self.counters()
            tokens, drafted, accepted, preempted = (after[name] - before[name] for name in after)
            before = after
            rss = self.rss()
            usage, sizes = engine["kv_usage"], engine["containers"]
            states.append(
                State(end, seconds, tokens, drafted, accepted, preempted, rss, usage, sizes)
            )
        return states, answers

    def engine_when_idle(self, model: str) -> dict[str, Any]:
        """What the engine holds when its last request is gone. Raises ServerError.

        vLLM's runner hears in the next step which requests have ended: one more request takes that step.
        """
        self.wait_for_requests()
        body = {"model": model, "prompt": [5], "max_tokens": 4, "temperature": 0.0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=IDLE_TIMEOUT_S)
        if answer.status_code != 200:
            raise self.error(f"answers {answer.status_code} after a leg")
        self.wait_for_requests()
        return self.engine_state()

    def wait_for_requests(self) -> None:
        """Wait until the engine has none. Raises ServerError."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while number := self.engine_state()["requests"]:
            if time.monotonic() > deadline:
                raise self.error(f"still has {number} requests of clients that are gone")
            time.sleep(0.1)

    def engine_state(self) -> dict[str, Any]:
        """As `SoakWorker` tells it. Raises ServerError."""
        try:
            url, method = f"{self.url}/collective_rpc", {"method": "engine_state"}
            response = httpx.post(url, json=method, timeout=IDLE_TIMEOUT_S)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise self.error(f"does not tell its state ({type(error).__name__})") from None
        (state,) = response.json()["results"]
        return state if isinstance(state, dict) else json.loads(state)

    def counters(self) -> dict[str, int]:
        """Tokens, drafted and accepted ones, preemptions since the start."""
        text = httpx.get(f"{self.url}/metrics", timeout=IDLE_TIMEOUT_S).text
        drafts = (f"spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted"))
        names = ("generation_tokens", *drafts, "num_preemptions")
        return {
            name: int(sum(map(float, re.findall(rf"^vllm:{name}_total\S* (\S+)$", text, re.M))))
            for name in names
        }

    def rss(self) -> dict[str, int]:
        """Resident bytes of every process of the server."""
        front = psutil.Process(self.process.pid)
        sizes = {"front end": front.memory_info().rss}
        for process in front.children(recursive=True):
            name = "engine" if "EngineCor" in process.name() else f"other {len(sizes)}"
            sizes[name] = process.memory_info().rss
        return sizes

    def error_lines(self) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if ERROR_LINE.search(line)]

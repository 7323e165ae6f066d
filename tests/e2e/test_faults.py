"""Real servers on one adapter folder that lose a process in flight, while others write into that folder.

After each fault: clients hear of it, no process is left, no file is half written, a new server starts, and the
other server has not noticed. All of it without a C++ compiler, and with a cache folder that cannot be written.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from e2e.engines import make_adapter
from e2e.servers import Server, running_server
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.training.evaluate import save_acceptance
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU_RUNNER, reason="servers are the CPU runner's"),
]
SHIPPED = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"
PROMPT = [5, 6, 7, 8]
NUM_TOKENS = 12
# Tokens of a request that is in flight when its server is hit: seconds, however late its client reads.
LONG = 8000
GONE_TIMEOUT_S = 60
LADDERS = [Ladder.fixed(Template.from_widths(widths, 3)) for widths in ([2, 1], [1, 1, 1])]


@contextmanager
def writers(adapter: Path) -> Iterator[list[int]]:
    """What `bita tune` and `bita eval` write into the folder, again and again; yields how often."""
    stop, counts = threading.Event(), [0, 0]
    statistics = AdapterConfig.load(SHIPPED).acceptance
    assert statistics is not None

    def tune() -> None:
        while not stop.is_set():
            LADDERS[counts[0] % 2].save(adapter / LADDER_FILE)
            counts[0] += 1
            time.sleep(0.01)

    def evaluate() -> None:
        while not stop.is_set():
            save_acceptance(adapter, statistics)
            counts[1] += 1
            time.sleep(0.01)

    threads = [threading.Thread(target=write) for write in (tune, evaluate)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Folder:
    """The model, its adapter, and what plain vLLM says."""

    def __init__(self, tiny_model, root: Path) -> None:
        self.model = tiny_model(
            "llama", num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=2 * LONG
        )
        self.adapter, self.root = make_adapter(self.model, root / "adapter"), root
        LADDERS[0].save(self.adapter / LADDER_FILE)
        self.files = sorted(os.listdir(self.adapter))
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        with engine(self.model, max_model_len=128) as llm:
            (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        self.expected = list(output.outputs[0].token_ids)
        self.servers = 0

    @contextmanager
    def server(self, *flags: str) -> Iterator[Server]:
        """Of a folder of its own; the adapter is everybody's."""
        self.servers += 1
        folder = self.root / f"server{self.servers}"
        folder.mkdir()
        flags_of_all = [
            "--max-model-len",
            str(LONG + 128),
            "--max-num-seqs",
            "4",
            "--block-size",
            "32",
        ]
        flags_of_all += ["--kv-cache-memory-bytes", str(16 << 20)]
        config = json.dumps({"method": "bita", "model": str(self.adapter)})
        flags_of_all += ["--speculative-config", config, *flags]
        with running_server(self.model, "tiny", flags_of_all, folder) as server:
            yield server

    def check(self, server: Server) -> None:
        """The server says what plain vLLM says, and the folder's files are whole."""
        answer = httpx.post(f"{server.url}/v1/completions", json=request(NUM_TOKENS), timeout=60)
        assert answer.json()["choices"][0]["token_ids"] == self.expected
        AdapterConfig.load(self.adapter)
        Ladder.load(self.adapter)


def request(max_tokens: int, **options) -> dict:
    return {
        "model": "tiny",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def hit_in_flight(server: Server, victim: psutil.Process) -> None:
    """Kill the process while a request streams; its client must hear an end, and all processes be gone."""
    processes = server.processes()
    assert victim in processes
    heard, whole = 0, False
    try:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=request(LONG, stream=True), timeout=60
        ) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                heard += 1
                whole |= '"finish_reason":"length"' in line
                if heard == 3:
                    victim.kill()
    except httpx.HTTPError as error:
        assert not isinstance(error, httpx.TimeoutException), "the client would wait for ever"
    assert heard >= 3 and not whole
    server.process.wait(GONE_TIMEOUT_S)
    left = psutil.wait_procs(processes, timeout=GONE_TIMEOUT_S)[1]
    assert [f"{process.pid} {process.name()} {process.status()}" for process in left] == []


def named(server: Server, name: str) -> psutil.Process:
    """Its process with that title."""
    found = [p for p in server.processes() if name in " ".join([p.name(), *p.cmdline()])]
    assert len(found) == 1, [p.cmdline() for p in server.processes()]
    return found[0]


def said(server: Server, what: str) -> list[str]:
    """Lines of its log."""
    return [line for line in server.log.read_text().splitlines() if what in line]


def test_servers_lose_processes_while_others_write_into_their_adapter(
    tiny_model, tmp_path, monkeypatch
):
    folder = Folder(tiny_model, tmp_path)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    # Plain vLLM's embedding of two ranks does not run without a compiler.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITA_CACHE", str(tmp_path / "file" / "cache"))
    with writers(folder.adapter) as counts, folder.server("--tensor-parallel-size", "2") as ranks:
        folder.check(ranks)
        (sentence, *_) = said(ranks, "no C++ kernels for the CPU")
        assert "/no/such/compiler" in sentence and "several times slower" in sentence

        with folder.server() as server:
            folder.check(server)
            hit_in_flight(server, named(server, "EngineCore"))
        folder.check(ranks)

        with folder.server() as server:
            hit_in_flight(ranks, named(ranks, "Worker_TP1"))
            folder.check(server)
            hit_in_flight(server, psutil.Process(server.process.pid))
            assert len(said(server, "The API server is gone")) == 1
    print(f"ladder and statistics written {counts} times")
    assert min(counts) > 100
    assert sorted(os.listdir(folder.adapter)) == folder.files

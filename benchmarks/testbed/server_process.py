"""A `vllm serve` process on a free port of this machine, for load benchmarks and for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_TIMEOUT_S = 60
# A busy server closes a connection that lay idle while a request is on its way to it, and the client
# sees "server disconnected"; with vLLM's 5 seconds that happens under load.
KEEP_ALIVE_S = 3600


class ServerError(RuntimeError):
    """A server that did not start, or that a load failed on; with the end of its log."""


class ServerProcess:
    """The process; its log is kept in a file."""

    def __init__(
        self,
        name: str,
        model: str | Path,
        flags: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `vllm serve model flags`; `name` is for error messages, `env` is this process's by default."""
        self.name, self.log = name, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *flags]
        keep_alive = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)}
        with log.open("w") as out:
            # In a session of its own, so that the engine's processes can be ended with it.
            self.process = subprocess.Popen(
                command,
                env={**(os.environ if env is None else env), **keep_alive},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Raises ServerError."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self.error("did not start")
            time.sleep(0.3)

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def error(self, what: str) -> ServerError:
        """With the end of the log."""
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        return ServerError(f"server {self.name} {what}; the end of its log:\n{tail}")

    def stop(self) -> None:
        """End it, and whatever of its processes is left."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

"""Engines that a CPU benchmark compares, each in a process of its own: what one is, how it answers, how it ends."""

import multiprocessing
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Arm:
    """One engine: plain vLLM (no tree), or BiTA with an adapter, a tree and perhaps a row budget.

    The tree 'none' is BiTA without drafts: what its kernels alone do.
    """

    name: str
    adapter: str = ""
    tree: str = ""
    row_budget: int | None = None

    @classmethod
    def bita(cls, spec: str, adapter: str, named: bool) -> "Arm":
        """'auto', 'auto:16' (at most 16 rows), 'masks:16' (no copies), '5,4,3' or a template file.

        The adapter is in the name or not.
        """
        tree, _, rows = spec.partition(":")
        path = str(Path(adapter).resolve()) if Path(adapter).exists() else adapter
        name = f"bita {spec} {Path(path).name}" if named else f"bita {spec}"
        return cls(name, path, tree, int(rows) if rows else None)

    def speculative_config(self) -> dict[str, Any] | None:
        if not self.tree:
            return None
        config: dict[str, Any] = {"method": "bita", "model": self.adapter}
        if self.tree == "none":
            return {**config, "ladder": str(NO_DRAFTS)}
        config["tree"] = "auto" if self.tree == MASKS_ALONE else self.tree
        if self.tree == MASKS_ALONE:
            config["copies"] = False
        if self.row_budget is not None:
            config["num_speculative_tokens"] = self.row_budget - 1
        return config


PLAIN = Arm("plain")
MASKS_ALONE = "masks"
NO_DRAFTS = Path(__file__).parent / "data" / "no_drafts_ladder.json"  # width 0 at every batch size


@dataclass
class Measurement:
    """One arm, one concurrency, one set of prompts.

    Attributes:
        seconds: from the first request to the last token.
        outputs: token ids of each prompt.
        accepted_length: tokens a request got per decode step; the token of its prefill not counted.
        step_ms: mean time of an engine step, over the steps in which no request came in.
    """

    seconds: float
    outputs: list[list[int]]
    accepted_length: float
    step_ms: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


def serve_engine(conn: Connection, log: str, engine_args: dict[str, Any]) -> None:
    """Start an engine, then answer (concurrency, prompts, max_tokens) until the pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from vllm import LLM

        llm = LLM(**engine_args)
        conn.send(engine_facts(llm.llm_engine.vllm_config))
        try:
            while True:
                task = conn.recv()
                if task == "peak memory":
                    conn.send(peak_rss_mib())
                else:
                    conn.send(measure(llm.llm_engine, *task))
        finally:
            llm.llm_engine.engine_core.shutdown()
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        conn.send(error)


def engine_facts(vllm_config: Any) -> dict[str, Any]:
    """Rows and shape of the step block, as the engine sees them."""
    spec = vllm_config.speculative_config
    if spec is None:
        return {"rows": 1, "block": "one row"}
    from bita_vllm.step.settings import get_settings

    settings = get_settings(vllm_config)
    assert settings is not None
    if not settings.ladder.lookup(1)[1]:
        return {"rows": 1, "block": "one row, by bita's kernels"}
    template = settings.template
    return {"rows": template.num_rows, "block": template.describe()}


def measure(
    engine: Any, concurrency: int, prompts: list[list[int]], max_tokens: int
) -> Measurement:
    """Serve all prompts greedily, `concurrency` of them in flight as long as they last."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    emissions = [0] * len(prompts)  # engine steps that gave a prompt tokens
    step_seconds: list[float] = []
    waiting, in_flight = list(range(len(prompts))), 0
    start = now = time.perf_counter()
    while waiting or in_flight:
        came_in = False
        while waiting and in_flight < concurrency:
            index = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": prompts[index]}, params)
            in_flight, came_in = in_flight + 1, True
        emitted = engine.step()
        last, now = now, time.perf_counter()
        if emitted and not came_in:
            step_seconds.append(now - last)
        for output in emitted:
            index, completion = int(output.request_id), output.outputs[0]
            if completion.token_ids:
                outputs[index] += completion.token_ids
                emissions[index] += 1
            in_flight -= output.finished
    decode_tokens = sum(map(len, outputs)) - len(outputs)
    return Measurement(
        seconds=now - start,
        outputs=outputs,
        accepted_length=decode_tokens / max(sum(emissions) - len(outputs), 1),
        step_ms=1e3 * statistics.mean(step_seconds) if step_seconds else float("nan"),
    )


def peak_rss_mib() -> float:
    """Peak resident memory of this process and the engine's processes, summed."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next((li for li in status.splitlines() if li.startswith("VmHWM")), "VmHWM: 0 kB")
        total += int(peak.split()[1])
    return total / 1024


class Engine:
    """The parent's end of a worker."""

    def __init__(
        self, arm: Arm, engine_args: dict[str, Any], logs: Path, serve: Any = serve_engine
    ) -> None:
        self.arm = arm
        self.log = logs / f"{arm.name.replace(' ', '-').replace('/', '_')}.log"
        args = {**engine_args, "speculative_config": arm.speculative_config()}
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        # Not a daemon: the engine has processes of its own.
        self._process = context.Process(target=serve, args=(theirs, str(self.log), args))
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def ask(self, *task: Any) -> Any:
        self._conn.send(task[0] if len(task) == 1 else task)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._conn.recv()
        except EOFError:
            answer = RuntimeError("the engine's process died")
        if isinstance(answer, Exception):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            self.close()
            sys.exit(f"{tail}\ncpu_throughput: arm '{self.arm.name}': {answer}")
        return answer

    def close(self) -> None:
        """End the worker and the engine's own processes, which outlive a worker that is killed."""
        self._conn.close()
        alive = self._process.is_alive()
        children = psutil.Process(self._process.pid).children(recursive=True) if alive else []
        self._process.join(timeout=30)
        for process in [self._process, *(child for child in children if child.is_running())]:
            process.kill()


def compute_on_every_core() -> None:
    """Each arm's engine runs in the arm's own process: vLLM's best on few cores.

    Otherwise its engine process waits for its worker in a busy loop, on a core that computes nothing (one request, two
    cores: plain vLLM 12.7 to 17 tokens/s, in one process 20.4).
    """
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))

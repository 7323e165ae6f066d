"""Engines of the suite, each in a process of its own; one that dies costs one arm.

The arms of a case are all up at once and take turns, so that drift of the machine hits all of them.
With `--dry` they run one after the other in this process, through Triton's interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu.machine import Machine

PLAIN = "plain"
START_LIMIT = 240  # seconds
SMALL = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,  # a long prompt comes in two chunks
    "num_gpu_blocks_override": 16,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Arm:
    """One engine.

    Attributes:
        options: arguments of vLLM's LLM class.
        bita: the speculative config less the method; None for plain vLLM.
        checked: a host sync or a late compilation in a step is an error, by vLLM's own checks.
        prepare: called with the engine before anything is asked; returns what undoes it.
    """

    name: str
    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    bita: dict[str, Any] | None = None
    checked: bool = False
    prepare: Callable[[Any], Callable[[], None]] | None = None


@dataclass(frozen=True)
class Task:
    """A question to an engine: `function(llm, **arguments)`.

    Attributes:
        seconds: expected on an H100; a task that no longer fits is not asked.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    seconds: float = 5.0


class Failed(Exception):
    """Why there is no answer; a sentence."""


@contextmanager
def engine(arm: Arm) -> Iterator[Any]:
    """vLLM's engine for an arm, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options = dict(arm.options)
    if arm.checked:
        os.environ["VLLM_GPU_SYNC_CHECK"] = "error"  # read when vLLM's worker is imported
        options["jit_monitor_mode"] = "error"
    from vllm import LLM

    from bita_vllm import plugin

    plugin.register()  # also where the package is on the path, but not installed
    if arm.bita is not None:
        options["speculative_config"] = {"method": "bita", **arm.bita}
    llm = LLM(str(arm.model), **{"async_scheduling": True, **options})
    try:
        if arm.prepare:
            arm.prepare(llm)
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _serve(conn: Any, log: Path, arm: Arm) -> None:
    """Start the engine, then answer until the pipe closes; what it says goes to the log."""
    os.setpgrp()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print(
        f"\n--- {arm.name}: {arm.options} {arm.bita} {'checked' if arm.checked else ''}", flush=True
    )
    try:
        with engine(arm) as llm:
            conn.send((True, None))
            while True:
                task = conn.recv()
                conn.send((True, task.function(llm, **task.arguments)))
    except (EOFError, BrokenPipeError):
        pass  # the parent closed it, or is gone
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            conn.send((False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]))


class Worker:
    """The parent's end of an engine's process."""

    def __init__(self, arm: Arm, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, arm))
        self._process.start()
        theirs.close()

    def receive(self, seconds: float) -> Any:
        """The answer, or the start's. Raises Failed."""
        try:
            if not self._conn.poll(max(seconds, 0)):
                raise Failed(f"no answer within {seconds:.0f} s")
            fine, answer = self._conn.recv()
        except (EOFError, OSError):
            raise Failed("the engine's process died") from None
        if not fine:
            raise Failed(answer)
        return answer

    def ask(self, task: Task, seconds: float) -> Any:
        """Raises Failed."""
        try:
            self._conn.send(task)
        except OSError:
            raise Failed("the engine's process died") from None
        return self.receive(seconds)

    def close(self) -> None:
        """End the process and its children; waits for a clean end first."""
        self._conn.close()
        self._process.join(timeout=20)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()


class LocalWorker:
    """The same in this process, for `--dry`."""

    def __init__(self, arm: Arm, log: Path) -> None:
        from testbed.engines import engine as interpreted

        unknown = ("load_format", "kv_cache_memory_bytes", "gpu_memory_utilization")
        options = {name: value for name, value in arm.options.items() if name not in unknown}
        self._stack = ExitStack()
        try:
            self._llm = self._stack.enter_context(
                interpreted(arm.model, arm.bita, **{**options, **SMALL})
            )
            if arm.prepare:
                self._stack.callback(arm.prepare(self._llm))
        except BaseException:
            self._stack.close()
            raise

    def receive(self, seconds: float) -> None:
        """It is up."""

    def ask(self, task: Task, seconds: float) -> Any:
        """Errors are the caller's to see: a dry run is a test."""
        return task.function(self._llm, **task.arguments)

    def close(self) -> None:
        """Shut the engine down."""
        self._stack.close()


class Engines:
    """The arms of a case: started together, asked in turn, each restarted once if it dies."""

    def __init__(self, machine: Machine, arms: Sequence[Arm]) -> None:
        self._machine, self._arms = machine, {arm.name: arm for arm in arms}
        self._workers: dict[str, Any] = {}
        self._restarts = dict.fromkeys(self._arms, 1)

    def answers(self, tasks: Sequence[Task]) -> Iterator[tuple[str, Task, Any]]:
        """(arm, task, answer or Failed), in the order of the tasks; every second task the arms swap places."""
        if self._machine.dry:
            for name in self._arms:
                self._start([name])
                yield from ((name, task, self._ask(name, task)) for task in tasks)
                self.close()
            return
        self._start(list(self._arms))
        try:
            for i, task in enumerate(tasks):
                names = list(self._arms) if i % 2 == 0 else list(self._arms)[::-1]
                yield from ((name, task, self._ask(name, task)) for name in names)
        finally:
            self.close()

    def checked(self, name: str) -> bool:
        """Whether that arm still runs under vLLM's checks."""
        return self._arms[name].checked

    def close(self) -> None:
        """End every engine."""
        while self._workers:
            self._workers.popitem()[1].close()

    def _start(self, names: Sequence[str]) -> None:
        kind = LocalWorker if self._machine.dry else Worker
        for name in names:
            self._workers[name] = kind(self._arms[name], self._machine.log)
        for name in names:
            try:
                self._workers[name].receive(min(START_LIMIT, self._machine.remaining()))
            except Failed as reason:
                self._lost(name, "its start", reason)
                if not self._arms[name].checked:  # a second try would end alike
                    self._restarts[name] = 0

    def _ask(self, name: str, task: Task) -> Any:
        if self._machine.remaining() < task.seconds:
            return Failed(f"not run: {self._machine.remaining():.0f} s left")
        if name not in self._workers:
            if not self._restarts[name] or self._machine.remaining() < 2 * START_LIMIT / 3:
                return Failed("not run: its engine is gone")
            self._restarts[name] -= 1
            # The checks have said what they had to say.
            self._arms[name] = replace(self._arms[name], checked=False)
            self._start([name])
            if name not in self._workers:
                return Failed("not run: its engine did not start again")
        try:
            limit = min(60 + 4 * task.seconds, self._machine.remaining())
            return self._workers[name].ask(task, limit)
        except Failed as reason:
            self._lost(name, task.name, reason)
            # What a check has ended is asked again without it.
            return self._ask(name, task) if self._arms[name].checked else reason

    def _lost(self, name: str, what: str, reason: Failed) -> None:
        self._machine.fail(f"{name}, {what}", str(reason))
        self._workers.pop(name).close()

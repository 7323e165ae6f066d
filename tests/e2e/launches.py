"""Counts what a step of the V2 runner launches around the forward pass: aten kernels and Triton kernels.

Views and allocations launch nothing. Copies that Triton's interpreter makes for itself are not counted, and neither
is the model's forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from vllm.v1.worker.gpu import model_runner as v2

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
REST = "vLLM's own"


class Launches(TorchDispatchMode):
    """Counts by part of a step; `steps` has one Counter for each finished step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[tuple[str, str]]] = []
        self._step: Counter[tuple[str, str]] = Counter()
        self._parts = [REST]
        self._paused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in ALLOCATIONS:
            self.count("aten")
        return func(*args, **(kwargs or {}))

    def count(self, kind: str) -> None:
        if not self._paused:
            self._step[self._parts[-1], kind] += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def end_step(self) -> None:
        self.steps.append(self._step)
        self._step = Counter()


def _inside(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def counted_launches(model: torch.nn.Module) -> Iterator[Launches]:
    """Steps of the V2 runner inside, plain or bita; `model` is the runner's."""
    from bita_vllm.runner.gpu import BitaGPUModelRunner, BlockSpeculator
    from bita_vllm.step.device import StepTrees

    launches = Launches()
    execute, sample_tokens = v2.GPUModelRunner.execute_model, v2.GPUModelRunner.sample_tokens
    launch = GridExecutor.__call__

    def counted_execute(*args: Any, **kwargs: Any) -> Any:
        with launches:
            return execute(*args, **kwargs)

    def counted_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        with launches:
            result = sample_tokens(*args, **kwargs)
        launches.end_step()
        return result

    def counted_launch(*args: Any, **kwargs: Any) -> Any:
        launches.count("Triton")
        with launches.paused():
            return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2.GPUModelRunner, "execute_model", counted_execute)
        patch.setattr(v2.GPUModelRunner, "sample_tokens", counted_sample_tokens)
        patch.setattr(GridExecutor, "__call__", counted_launch)
        patch.setattr(model, "forward", _inside(launches.paused, model.forward))
        for owner, name in (
            (StepTrees, "begin"),
            (v2.GPUModelRunner, "sample"),
            (BitaGPUModelRunner, "sample"),
            (BlockSpeculator, "propose"),
        ):
            function = getattr(owner, name)
            patch.setattr(owner, name, _inside(lambda name=name: launches.part(name), function))
        yield launches

"""Triton launches of this process, in the interpreter: programs without work, and what a GPU would compile."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter


@dataclass
class Launches:
    """By kernel name: programs, those that stored nothing, and specialisations as Triton's compiler keys them."""

    programs: Counter[str] = field(default_factory=Counter)
    idle: Counter[str] = field(default_factory=Counter)
    keys: set[tuple[Any, ...]] = field(default_factory=set)


@contextmanager
def recorded_launches() -> Iterator[Launches]:
    """What is launched inside."""
    seen = Launches()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run = interpreter.InterpretedFunction.run
    call, place, store = executor.__call__, builder.set_grid_idx, builder.create_masked_store
    started: set[tuple[int, ...]] = set()
    worked: set[tuple[int, ...]] = set()

    any_number: list[Any] = []

    def running(self: Any, *args: Any, **kwargs: Any) -> None:
        any_number[:] = self.kwargs.get("do_not_specialize") or ()
        run(self, *args, **kwargs)

    def calling(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        seen.keys.add((name, *_specialisation(self, args, kwargs, any_number)))
        started.clear()
        worked.clear()
        call(self, *args, **kwargs)
        seen.programs[name] += len(started)
        seen.idle[name] += len(started - worked)

    def placing(self: Any, *index: int) -> None:
        started.add(index)
        self.program = index
        place(self, *index)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        if mask.data.any():
            worked.add(self.program)
        return store(self, pointers, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", running)
        patch.setattr(executor, "__call__", calling)
        patch.setattr(builder, "set_grid_idx", placing)
        patch.setattr(builder, "create_masked_store", storing)
        yield seen


def _specialisation(kernel: Any, args: Any, kwargs: Any, any_number: list[str]) -> tuple[Any, ...]:
    """Types, constants, ones, and multiples of 16: what a kernel is compiled for (triton/runtime/jit.py)."""
    names = inspect.signature(kernel.fn).parameters
    given = inspect.signature(kernel.fn).bind(
        *args, **{name: value for name, value in kwargs.items() if name in names}
    )
    given.apply_defaults()
    options = {name: value for name, value in kwargs.items() if name not in names}
    key: list[Any] = [tuple(sorted(options.items()))]
    for name, value in given.arguments.items():
        if torch.is_tensor(value):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif name in any_number:
            key.append((name, "any"))
        elif name in kernel.constexprs or value is None or isinstance(value, bool):
            key.append((name, repr(value)))
        elif isinstance(value, int):
            size = "i32" if -(2**31) <= value < 2**31 else "i64"
            key.append((name, 1 if value == 1 else (size, value % 16 == 0)))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)

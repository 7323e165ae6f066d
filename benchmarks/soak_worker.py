"""A look into a server's engine: vLLM's `--worker-extension-cls`, asked by `POST /collective_rpc`.

Only of use where one process computes and schedules (`VLLM_ENABLE_V1_MULTIPROCESSING=0`).
"""

import inspect
import sys
from collections import Counter, deque
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

CONTAINERS = (dict, list, set, deque, WeakKeyDictionary, WeakValueDictionary, WeakSet)
CACHED_FUNCTION = type(cache(len))
OURS = ("bita_vllm", "bita_kernels")


class SoakWorker:
    """Methods that vLLM adds to its worker."""

    model_runner: Any

    def engine_state(self) -> dict[str, Any]:
        """Requests, share of the KV cache in use, and the entries of every container of ours."""
        scheduler = calling_engine().scheduler
        owners = self.model_runner, scheduler, scheduler.structured_output_manager
        return {
            "requests": len(scheduler.requests),
            "kv_usage": scheduler.kv_cache_manager.usage,
            "containers": dict(container_sizes(*owners)),
        }


def calling_engine() -> Any:
    """vLLM's engine core: it is among the callers."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, "scheduler"):
            return caller
        frame = frame.f_back
    raise RuntimeError("the engine's scheduler is in another process")


def container_sizes(*owners: Any) -> Counter[str]:
    """'Class.attribute' -> entries: of the owners, of all objects of ours that they hold, and of our modules."""
    sizes: Counter[str] = Counter()
    seen, left = set(), list(owners)
    while left:
        owner = left.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in vars(owner).items():
            if isinstance(value, CONTAINERS):
                sizes[f"{type(owner).__name__}.{name}"] += len(value)
            left += [held for held in held_by(value) if is_ours(held)]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OURS:
            for attribute, value in vars(module).items():
                if isinstance(value, CONTAINERS) and not attribute.startswith("__"):
                    sizes[f"{name}.{attribute}"] += len(value)
                elif isinstance(value, CACHED_FUNCTION):
                    sizes[f"{name}.{attribute}"] += value.cache_info().currsize
    return sizes


def held_by(value: Any) -> Iterator[Any]:
    """The value itself, or what the container holds."""
    if isinstance(value, (dict, WeakKeyDictionary, WeakValueDictionary)):
        yield from list(value.values())
    elif isinstance(value, (tuple, *CONTAINERS)):
        yield from list(value)
    else:
        yield value


def is_ours(value: Any) -> bool:
    """Whether it is an object with attributes, of a class of ours."""
    kind = type(value)
    return kind.__module__.partition(".")[0] in OURS and hasattr(value, "__dict__")

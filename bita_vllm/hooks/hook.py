"""A hook: one spot of vLLM that bita builds on, and what is wrong with one that does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Hook:
    """One spot of vLLM.

    Attributes:
        target: 'module:qualname'.
        why: what bita needs it for.
        signature: parameter names as `signature_text` writes them, in every supported version.
        patch: called in its place, with the original first; None for a method we only override.
    """

    target: str
    why: str
    signature: str
    patch: Function | None = None


@dataclass(frozen=True)
class Problem:
    """A hook that does not hold: `state` is 'missing' or 'changed'."""

    hook: Hook
    state: str
    found: str = ""

    def __str__(self) -> str:
        if self.state == "missing":
            return f"{self.hook.target} is missing"
        return f"{self.hook.target} has the signature {self.found}, expected {self.hook.signature}"

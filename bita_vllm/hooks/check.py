"""Whether hooks hold: in the installed vLLM, which imports its modules, or in a source tree, which only reads files."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from bita_vllm.hooks.hook import Function, Hook, Problem


def signature_text(function: Function) -> str:
    """Parameter names without types: `name=` has a default."""
    parts: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not any(
                p.startswith("*") for p in parts
            ):
                parts.append("*")
            parts.append(name if parameter.default is parameter.empty else f"{name}=")
    return f"({', '.join(parts)})"


def locate(target: str) -> tuple[Any, str]:
    """The owner (module or class) and the attribute's name. Raises ImportError, AttributeError."""
    module_name, qualname = target.split(":")
    owner: Any = importlib.import_module(module_name)
    *path, name = qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def stored_attribute(owner: Any, name: str) -> Any:
    """The attribute as it is stored: a staticmethod or classmethod stays one."""
    return vars(owner)[name]


def check_installed(hooks: tuple[Hook, ...]) -> list[Problem]:
    """Hooks that do not hold in the installed vLLM; imports their modules."""
    problems = []
    for hook in hooks:
        try:
            owner, name = locate(hook.target)
            found = signature_text(function_of(stored_attribute(owner, name)))
        except (ImportError, AttributeError, KeyError):
            problems.append(Problem(hook, "missing"))
            continue
        if found != hook.signature:
            problems.append(Problem(hook, "changed", found))
    return problems


def function_of(stored: Any) -> Function:
    """The function of an attribute as it is stored."""
    return stored.__func__ if isinstance(stored, staticmethod | classmethod) else stored


# --- Hooks in a vLLM source tree: reads files, imports nothing ------------------------------------


def check_source(
    vllm_package_dir: str | Path,
    hooks: tuple[Hook, ...],
) -> list[Problem]:
    """Hooks that do not hold in the vLLM source tree `vllm_package_dir` (the folder `vllm`)."""
    return compare_signatures(source_signatures(vllm_package_dir, hooks), hooks)


def source_signatures(
    vllm_package_dir: str | Path, hooks: tuple[Hook, ...]
) -> dict[str, str | None]:
    """Target -> its signature in a vLLM source tree, None if it is not there."""
    return {hook.target: _source_signature(Path(vllm_package_dir), hook.target) for hook in hooks}


def compare_signatures(found: dict[str, str | None], hooks: tuple[Hook, ...]) -> list[Problem]:
    """Hooks whose signature in `found` is absent or another."""
    problems = []
    for hook in hooks:
        signature = found.get(hook.target)
        if signature is None:
            problems.append(Problem(hook, "missing"))
        elif signature != hook.signature:
            problems.append(Problem(hook, "changed", signature))
    return problems


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def source_node(package_dir: Path, target: str) -> Any:
    """A module's or class's own definition of that name in a vLLM source tree, None if it is not there."""
    module_name, qualname = target.split(":")
    base = package_dir.joinpath(*module_name.split(".")[1:])
    path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if path is None:
        return None
    node: Any = _parse(path)
    for part in qualname.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            return None
    return node


def _source_signature(package_dir: Path, target: str) -> str | None:
    """As `signature_text`, of the module's or class's own function of that name."""
    node = source_node(package_dir, target)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    required = len(plain) - len(a.defaults)
    parts = [p.arg if i < required else f"{p.arg}=" for i, p in enumerate(plain)]
    if a.vararg or a.kwonlyargs:
        parts.append(f"*{a.vararg.arg}" if a.vararg else "*")
    parts += [
        p.arg if default is None else f"{p.arg}="
        for p, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    if a.kwarg:
        parts.append(f"**{a.kwarg.arg}")
    return f"({', '.join(parts)})"

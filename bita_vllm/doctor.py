"""`bita doctor`: can this installation run bita? vLLM version, hooks, platform, adapter."""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bita_vllm import patches
from bita_vllm.patches import Hook, Problem


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the `bita` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="say whether this installation can run bita",
        description="Check vLLM's version, each hook bita uses, the platform and an adapter. "
        "Exit code 0 if everything is well, else 1.",
    )
    parser.add_argument(
        "--model", help="base model (directory or hub name) to check --adapter against"
    )
    parser.add_argument("--adapter", help="adapter directory or hub name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit code."""
    checks = list(examine(args.model, args.adapter))
    ok = all(check.ok for check in checks)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print_table(checks, ok)
    return 0 if ok else 1


def examine(model: str | None = None, adapter: str | None = None) -> Iterator[Check]:
    """All checks that can be made, in the order of the report."""
    version = patches.vllm_version()
    works = " and ".join(f"{v}.x" for v in patches.SUPPORTED_VERSIONS)
    yield Check(
        "vLLM",
        patches.is_supported(version),
        f"{version or 'not installed'} (bita works with {works})",
    )
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return
    yield _check_plugin()
    yield from _check_hooks(Path(spec.origin).parent)
    yield _check_platform()
    if adapter is not None:
        yield _check_adapter(adapter, model)
    elif model is not None:
        yield Check(
            "adapter",
            False,
            "--model is given without --adapter; give both to check one for the other",
        )


def _check_plugin() -> Check:
    names = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    if "bita" not in names:
        return Check(
            "plugin", False, "no entry point 'bita' in vllm.general_plugins; pip install bita-vllm"
        )
    if allowed is not None and "bita" not in allowed.split(","):
        return Check("plugin", False, f"VLLM_PLUGINS={allowed} leaves 'bita' out; add it")
    return Check("plugin", True, "vLLM loads it")


def _check_hooks(package_dir: Path) -> Iterator[Check]:
    hooks = patches.PATCHES + patches.OVERRIDES
    problems = {p.hook.target: p for p in check_source(package_dir, hooks)}
    for hook in hooks:
        problem = problems.get(hook.target)
        yield Check(f"hook {hook.target}", problem is None, f"{problem}" if problem else hook.why)


def _check_platform() -> Check:
    from bita_vllm.config import device_name, on_gpu, refuse_platform

    if refusal := refuse_platform():
        return Check("platform", False, refusal)
    place, runner = ("CUDA", "V2") if on_gpu() else ("CPU", "V1")
    return Check("platform", True, f"{place} ({device_name()}), vLLM's {runner} model runner")


def _check_adapter(adapter: str, model: str | None) -> Check:
    from bita_vllm.adapter.checkpoint import Adapter, resolve_adapter_dir
    from bita_vllm.adapter.config import AdapterError, ModelShape

    try:
        shape = None if model is None else ModelShape.from_hf_config(_text_config(model))
        loaded = Adapter.load(resolve_adapter_dir(adapter), shape)
    except (AdapterError, OSError, ValueError) as error:
        return Check("adapter", False, " ".join(str(error).split()))
    config, lora = loaded.config, loaded.mask_lora
    deltas = f"deltas of rank {lora.rank} ({lora.num_bytes / 2**20:.1f} MiB), " if lora else ""
    fits = f"fits {model}" if model else f"trained for {config.verifier} (give --model to check it)"
    return Check(
        "adapter",
        True,
        f"{config.num_mask_tokens} mask tokens, {config.num_prompt_tokens} prompt tokens, "
        f"{deltas}{loaded.num_bytes / 2**20:.1f} MiB; {fits}",
    )


def _text_config(model: str) -> Any:
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    return get_hf_text_config(get_config(model, trust_remote_code=False))


def _print_table(checks: list[Check], ok: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAIL[/]"
        name = check.name.rpartition(":")[2]  # a hook's class and method; the module is in --json
        table.add_row(mark, escape(name), escape(check.detail))
    console = Console()
    console.print(table)
    console.print(
        "This installation can run bita." if ok else "This installation cannot run bita as it is."
    )


def require_support() -> None:
    """Raise ConfigError unless this vLLM can run bita; called when a run asks for it."""
    from bita_vllm.config import ConfigError

    works = " and ".join(f"{v}.x" for v in patches.SUPPORTED_VERSIONS)
    version = patches.vllm_version()
    if not patches.is_supported(version):
        raise ConfigError(
            f"bita works with vLLM {works}, but this is vLLM {version}; install one of those."
        )
    import vllm

    problems = patches.check_installed(patches.PATCHES) + check_source(
        Path(vllm.__file__).parent, patches.OVERRIDES
    )
    if problems:
        listed = "; ".join(map(str, problems))
        raise ConfigError(
            f"bita works with vLLM {works} as released, but in this vLLM {version} {listed}; "
            "reinstall vLLM."
        )


# --- Hooks in a vLLM source tree: reads files, imports nothing ------------------------------------


def check_source(
    vllm_package_dir: str | Path, hooks: tuple[Hook, ...] = patches.PATCHES + patches.OVERRIDES
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
    """As `patches.signature_text`, of the module's or class's own function of that name."""
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

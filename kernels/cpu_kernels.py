"""`torch.ops.bita.*_cpu` (see OPERATIONS): C++, built for this machine once.

Without a C++ compiler they are their twins in torch, with a warning: the same results, more slowly.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bita_kernels.add_mask_lora_cpu_naive import add_mask_lora_cpu_naive
from bita_kernels.find_copies_cpu_naive import find_copies_cpu_naive
from bita_kernels.linear_bf16_cpu_naive import linear_bf16_cpu_naive
from bita_kernels.linear_cpu_naive import linear_cpu_naive
from bita_kernels.move_kv_cpu_naive import move_kv_cpu_naive
from bita_kernels.top_tokens_cpu_naive import top_tokens_cpu_naive
from bita_kernels.tree_attention_cpu_naive import tree_attention_cpu_naive
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
# Not -ffast-math: a masked score is minus infinity.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=256",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
]
HASH_BYTES = 32
BUILD_TIMEOUT_S = 600  # a source; 35 s for all of them on two idle cores


def no_result(*arguments: Any) -> None:
    """What torch.compile traces in the place of an operation that only writes."""


# name: (arguments, twin, what torch.compile traces in its place); what the arguments are stands in the twins
OPERATIONS: dict[str, tuple[str, Any, Any]] = {
    "tree_attention_cpu": (
        "(Tensor query, Tensor kv_cache, Tensor block_table, Tensor first_row, Tensor num_rows, "
        "Tensor context_len, Tensor line, Tensor depth, Tensor ancestors, Tensor mask_index, "
        "Tensor prompt_keys, Tensor prompt_values, Tensor(a!) out, float scale, float softcap, "
        "int window, Tensor? sinks=None, int chunk=0) -> ()",
        tree_attention_cpu_naive,
        no_result,
    ),
    "add_mask_lora_cpu": (
        "(Tensor(a!) output, Tensor x, Tensor packed_a, Tensor packed_b, Tensor parts, Tensor mask_rows, "
        "Tensor num_mask_rows) -> ()",
        add_mask_lora_cpu_naive,
        no_result,
    ),
    "linear_cpu": (
        "(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor",
        linear_cpu_naive,
        lambda x, packed, bias, out_features: x.new_empty(*x.shape[:-1], out_features),
    ),
    "linear_bf16_cpu": (
        "(Tensor x, Tensor packed, Tensor? bias, int out_features, Tensor? packed_a=None, "
        "Tensor? packed_b=None, Tensor? part_of_panel=None, Tensor? mask_rows=None, "
        "Tensor? num_mask_rows=None) -> Tensor",
        linear_bf16_cpu_naive,
        lambda x, packed, bias, out_features, *deltas: x.new_empty(*x.shape[:-1], out_features),
    ),
    "move_kv_cpu": (
        "(Tensor(a!)[] kv_caches, Tensor source, Tensor target) -> ()",
        move_kv_cpu_naive,
        no_result,
    ),
    "top_tokens_cpu": (
        "(Tensor logits, Tensor rows, int k) -> (Tensor, Tensor)",
        top_tokens_cpu_naive,
        lambda logits, rows, k: (rows.new_empty(len(rows), k), logits.new_empty(len(rows), k)),
    ),
    "find_copies_cpu": (
        "(Tensor token_ids, Tensor num_tokens, Tensor slots, int max_places, Tensor(a!) head, Tensor(b!) previous, "
        "Tensor(c!) state, Tensor(d!) copies, Tensor(e!) length, Tensor(f!) outcome) -> ()",
        find_copies_cpu_naive,
        no_result,
    ),
}

logger = logging.getLogger("vllm.bita")
_library = torch.library.Library("bita", "FRAGMENT")


class BuildError(RuntimeError):
    """No library could be made from the source on this machine."""


@cache
def register() -> bool:
    """Make the operations known to torch; False if they are the twins. Builds where no build is found."""
    for name, (arguments, _, traced) in OPERATIONS.items():
        _library.define(name + arguments)
        torch.library.register_fake(f"bita::{name}", traced)
    try:
        load()
    except (BuildError, OSError) as error:
        logger.warning(
            "bita: no C++ kernels for the CPU (%s); step blocks run in torch operations, several times slower.",
            " ".join(str(error).split()),
        )
        for name, (_, twin, _) in OPERATIONS.items():
            _library.impl(name, twin, "CPU")
        return False
    if not has_bf16_products():
        _library.impl("linear_bf16_cpu", linear_bf16_cpu_naive, "CPU")
    return True


def has_bf16_products() -> bool:
    """Whether the CPU multiplies bfloat16 as `linear_bf16_cpu` does it: with AVX512-BF16."""
    return torch.cpu._is_avx512_bf16_supported()


def cache_folder() -> Path:
    """Where builds are kept: in $BITA_CACHE, else $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("BITA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "bita" / "kernels"


def load() -> None:
    """Load the library; one that cannot be kept is built for this process only.

    Raises:
        BuildError, OSError: there is none.
    """
    folder = cache_folder()
    try:
        library = build(folder)
    except OSError as error:
        logger.warning(
            "bita: the C++ kernels for the CPU are compiled at every start, as they cannot be kept in %s (%s); "
            "name another folder as BITA_CACHE.",
            folder,
            error.strerror,
        )
        with tempfile.TemporaryDirectory() as scratch:
            torch.ops.load_library(build(Path(scratch)))
        return
    torch.ops.load_library(library)


def is_whole(library: Path) -> bool:
    """Whether the file is there as it was built: its last bytes are the hash of the others.

    To load a part of a library ends the process.
    """
    if not library.is_file():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


def build(folder: Path) -> Path:
    """The library for this source, machine and torch in `folder`; compiled if it is not there, and whole.

    Raises:
        BuildError: there is no compiler, or it fails; the message is its first error.
        OSError: nothing can be written to the folder.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler: neither g++ nor clang++ is on the PATH; install g++")
    # Says what -march=native means here.
    macros = run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    key = "\n".join(
        [*(path.read_text() for path in SOURCES + HEADERS), *FLAGS, torch.__version__, macros]
    )
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if is_whole(library):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch_folder = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Moved into its place when whole: another process may build it at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, made = (
            [f"{scratch}/{source.stem}.o" for source in SOURCES],
            Path(scratch) / library.name,
        )
        commands = [
            [compiler, *FLAGS, *headers, "-c", str(source), "-o", to]
            for source, to in zip(SOURCES, compiled, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, commands))
        # OpenMP is the one that torch has loaded: a second one would have threads of its own.
        torch_libraries = [*torch_folder, "-lc10", "-ltorch", "-ltorch_cpu"]
        run([compiler, "-shared", *compiled, "-o", str(made), *torch_libraries])
        with made.open("rb+") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        made.replace(library)
    return library


def run(command: list[str]) -> str:
    """Its output. Raises BuildError."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["failed"]
        raise BuildError(f"{command[0]}: {errors[0]}")
    return done.stdout

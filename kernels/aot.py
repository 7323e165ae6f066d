"""Compile every shipped configuration ahead of time, without a GPU, and say what came out.

    python -m bita_kernels.aot                     # all kernels, all targets
    python -m bita_kernels.aot --kernel move_kv --sm 90 --csv kernels.csv

Triton compiles down to a cubin by itself (ptxas lies in its wheel); registers and local memory come
from `cuobjdump -res-usage`, instructions from `cuobjdump -sass`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .shipped import TARGETS, Shipped

KERNEL_FILES = (
    "tree_attention",
    "begin_step",
    "accept_tree",
    "extend_paths",
    "rank_tokens",
    "build_block",
    "find_copies",
    "move_kv",
    "add_mask_lora",
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# HMMA/IMMA/QMMA: mma.sync (sm_80 and later); HGMMA/QGMMA: wgmma (sm_90); UTC?MMA: tcgen05 (sm_100).
TENSOR_CORE = re.compile(r"\b(?:UTC\w*MMA|[HIQD]G?MMA)\b")
BUFFERED_TILE = re.compile(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")


@dataclass(frozen=True)
class Limits:
    """Of one SM, from the CUDA programming guide, table 'Technical specifications per compute capability'."""

    shared_per_block: int
    shared_per_sm: int
    warps: int = 64
    blocks: int = 32
    registers: int = 64 * 1024


# The driver keeps 1 KiB of an SM's shared memory for each resident block.
RESERVED_SHARED = 1024
LIMITS = {
    80: Limits(163 * 1024, 164 * 1024),
    89: Limits(99 * 1024, 100 * 1024, warps=48, blocks=24),
    90: Limits(227 * 1024, 228 * 1024),
    100: Limits(227 * 1024, 228 * 1024),
    120: Limits(99 * 1024, 100 * 1024, warps=48),
}


@dataclass(frozen=True)
class Compiled:
    """One row of the table.

    Attributes:
        registers: per thread.
        spills: bytes of stack and local memory per thread: that is where spilled registers go.
        shared: bytes per block. `tensor_memory`: columns per block (sm_100).
        needs_tensor_cores: whether the configuration must use them.
        tensor_core: where it must, their instructions and how often each occurs, "" for none.
        buffers: tiles of K and of V in shared memory, all but one of them on their way; 0: no such loop.
        programs: resident per SM, by registers and shared memory.
        occupancy: their warps over the most there can be.
    """

    kernel: str
    configuration: str
    sm: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    needs_tensor_cores: bool
    tensor_core: str
    buffers: int
    programs: int
    occupancy: float


def collect(kernel_files: Iterable[str] = KERNEL_FILES) -> list[tuple[str, Shipped]]:
    """(kernel file, configuration) of every kernel file that is there."""
    return [
        (name, configuration)
        for name in kernel_files
        if importlib.util.find_spec(f"{__package__}.{name}")
        for configuration in importlib.import_module(f"{__package__}.{name}").shipped()
    ]


def compile_one(kernel_file: str, shipped: Shipped, sm: int) -> Compiled:
    """Compile for one target and read the cubin.

    Raises:
        RuntimeError: it does not compile; TRITON_INTERPRET was set when the kernels were imported.
        ValueError: the configuration names arguments that the kernel lacks, or leaves some out.
    """
    names = getattr(shipped.kernel, "arg_names", None)
    if not isinstance(shipped.kernel, triton.JITFunction) or names is None:
        raise RuntimeError(
            "The kernels were imported for the interpreter; unset TRITON_INTERPRET to compile them."
        )
    given = [*shipped.signature, *shipped.constexprs, *shipped.divisible]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{kernel_file} {shipped.name}: the kernel has no argument {unknown}.")
    if missing := [n for n in names if n not in {*shipped.signature, *shipped.constexprs}]:
        raise ValueError(f"{kernel_file} {shipped.name}: nothing is said about {missing}.")
    signature = {
        name: "constexpr" if name in shipped.constexprs else shipped.signature[name]
        for name in names
    }
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in shipped.divisible]
    source = ASTSource(
        shipped.kernel,
        signature,
        dict(shipped.constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:
        raise RuntimeError(
            f"{kernel_file} {shipped.name} does not compile for sm_{sm}: {error}"
        ) from error
    registers, local, instructions = read_cubin(compiled.asm["cubin"], shipped.tensor_cores)
    # Warp-specialised kernels run more warps than asked for.
    warps = getattr(compiled.metadata, "total_num_warps", None) or shipped.num_warps
    shared = compiled.metadata.shared
    programs = resident_programs(LIMITS[sm], warps, registers, shared)
    return Compiled(
        kernel=kernel_file,
        configuration=shipped.name,
        sm=sm,
        num_warps=shipped.num_warps,
        num_stages=shipped.num_stages,
        registers=registers,
        spills=local,
        shared=shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        needs_tensor_cores=shipped.tensor_cores,
        tensor_core=instructions,
        buffers=num_buffers(compiled.asm["ttgir"]),
        programs=programs,
        occupancy=programs * warps / LIMITS[sm].warps,
    )


def read_cubin(cubin: bytes, look_for_tensor_cores: bool) -> tuple[int, int, str]:
    """Registers per thread, bytes of local memory per thread, tensor-core instructions (disassembly is slow)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        what = ["-res-usage", *(["-sass"] if look_for_tensor_cores else [])]
        text = subprocess.run(
            [TOOLS / "cuobjdump", *what, path], capture_output=True, text=True, check=True
        ).stdout
    resource = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    found = TENSOR_CORE.findall(text)
    counts = [f"{name} {found.count(name)}" for name in sorted(set(found))]
    return resource["REG"], resource["STACK"] + resource["LOCAL"], ", ".join(counts)


def num_buffers(ttgir: str) -> int:
    """The most buffers of one tile: a pipelined load's allocation has their number in front of the shape."""
    return max(map(int, BUFFERED_TILE.findall(ttgir)), default=0)


def resident_programs(limits: Limits, warps: int, registers: int, shared: int) -> int:
    """Registers are handed out to warps in units of 256, shared memory in KiB (near enough)."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // registers_of_warp // warps
    by_shared = limits.shared_per_sm // (shared + RESERVED_SHARED)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def compile_all(kernel_files: Iterable[str], targets: Iterable[int]) -> Iterator[Compiled]:
    """Every configuration for every target that it ships for, in the order of the table."""
    jobs = [
        (name, configuration, sm)
        for name, configuration in collect(kernel_files)
        for sm in targets
        if sm in configuration.targets
    ]
    # ptxas and cuobjdump are processes of their own: threads keep the cores busy.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda job: compile_one(*job), jobs)


def table(rows: list[Compiled]) -> str:
    """Aligned columns: text to the left, numbers to the right."""
    names = [field.name.replace("_", " ") for field in fields(Compiled)]
    lines = [
        [f"{v:.0%}" if isinstance(v, float) else str(v) for v in asdict(row).values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    is_text = [field.type == "str" for field in fields(Compiled)]

    def line(cells: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(cells, widths, is_text, strict=True)
        ).rstrip()

    return "\n".join(map(line, [names, ["-" * width for width in widths], *lines]))


def main(arguments: list[str] | None = None) -> None:
    """Command line: print the table, write the CSV if asked."""
    parser = argparse.ArgumentParser(prog="python -m bita_kernels.aot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kernel", nargs="+", choices=KERNEL_FILES, default=KERNEL_FILES)
    parser.add_argument("--sm", nargs="+", type=int, choices=TARGETS, default=TARGETS)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    given = parser.parse_args(arguments)
    rows = list(compile_all(given.kernel, given.sm))
    if not rows:
        sys.exit("Nothing is shipped for this choice of --kernel and --sm.")
    print(table(rows))
    if given.csv:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Compiled)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()

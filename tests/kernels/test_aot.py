"""Every shipped configuration, compiled for all targets without a GPU.

In a process of its own: this one has imported the kernels for the interpreter. Triton's cache makes a
second run a matter of seconds.
"""

import csv
import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
from bita_kernels.aot import LIMITS, resident_programs
from bita_kernels.shipped import TARGETS

# Compiled here: mma.sync with least shared memory, wgmma, tcgen05. The table in benchmarks/results has all targets.
COMPILED = (89, 90, 100)
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_aot.csv"
SHIPPED = """
from bita_kernels.aot import collect
print([(name, this.name, sm) for name, this in collect() for sm in this.targets])
"""
FORCED_SPILL = """
import triton
from bita_kernels.aot import GPUTarget, read_cubin
from bita_kernels.rank_tokens import shipped
from triton.compiler import ASTSource
this = shipped()[0]
signature = {name: this.signature.get(name, "constexpr") for name in this.kernel.arg_names}
source = ASTSource(this.kernel, signature, dict(this.constexprs))
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"maxnreg": 40})
print(read_cubin(compiled.asm["cubin"], look_for_tensor_cores=False))
"""
EARLY_MERGE = """
import re, triton
from bita_kernels.aot import GPUTarget
from bita_kernels.tree_attention import shipped
from triton.compiler import ASTSource
for this in shipped():
    if this.name.startswith("Llama-3-8B R16 ") and this.constexprs.get("PARALLEL", True):
        signature = {name: this.signature.get(name, "constexpr") for name in this.kernel.arg_names}
        source = ASTSource(this.kernel, signature, dict(this.constexprs))
        ptx = triton.compile(source, target=GPUTarget("cuda", this.targets[-1], 32)).asm["ptx"]
        pattern = r"griddepcontrol.\\w+|ld.global|cp.async.c|st.global|\\bret;"
        print(this.targets[-1], re.findall(pattern, ptx)[:5])
"""


def run_without_interpreter(*arguments: str | Path) -> str:
    """Run Python, return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of the table, as the command writes them."""
    path = tmp_path_factory.mktemp("aot") / "kernels.csv"
    targets = map(str, COMPILED)
    print(run_without_interpreter("-m", "bita_kernels.aot", "--sm", *targets, "--csv", path))
    return rows_of(path)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def offenders(rows, is_bad):
    return [f"{r['kernel']} {r['configuration']} sm_{r['sm']}" for r in rows if is_bad(r)]


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_target(compiled):
    seen = {(row["kernel"], int(row["sm"])) for row in compiled}
    kernels = {"tree_attention", "begin_step", "accept_tree", "extend_paths", "rank_tokens"}
    kernels |= {"build_block", "find_copies", "move_kv", "add_mask_lora"}
    assert seen == {(kernel, sm) for kernel in kernels for sm in COMPILED}


def test_the_table_has_what_is_shipped_for_all_targets_without_spills():
    """Made by `python -m bita_kernels.aot --csv benchmarks/results/kernels_aot.csv`."""
    table = rows_of(TABLE)
    written = [(row["kernel"], row["configuration"], int(row["sm"])) for row in table]
    shipped = literal_eval(run_without_interpreter("-c", SHIPPED))
    assert sorted(written) == sorted(shipped)
    assert {sm for _, _, sm in shipped} == set(TARGETS)
    assert not offenders(table, lambda row: int(row["spills"]) > 0)


@pytest.mark.slow
def test_nothing_spills(compiled):
    assert not offenders(compiled, lambda row: int(row["spills"]) > 0)


@pytest.mark.slow
def test_shared_memory_stays_below_the_limit_of_the_target(compiled):
    def too_much(row):
        return int(row["shared"]) > LIMITS[int(row["sm"])].shared_per_block

    assert not offenders(compiled, too_much)
    assert not offenders(compiled, lambda row: float(row["occupancy"]) <= 0)


@pytest.mark.slow
def test_attention_and_deltas_run_on_tensor_cores(compiled):
    needs = [row for row in compiled if row["needs_tensor_cores"] == "True"]
    assert {row["kernel"] for row in needs} == {"tree_attention", "add_mask_lora"}
    assert not offenders(needs, lambda row: not row["tensor_core"])


@pytest.mark.slow
def test_a_merge_that_starts_early_reads_partial_results_when_they_are_there():
    """Before the wait come its three loads of what the attention was given, and no return; from sm_90 on."""
    lines = run_without_interpreter("-W", "ignore", "-c", EARLY_MERGE).splitlines()
    found = [(int(sm), literal_eval(names)) for sm, names in (line.split(" ", 1) for line in lines)]
    assert [sm for sm, _ in found] == [89, 120, 89, 120]
    assert found[1][1][0] == "griddepcontrol.launch_dependents"
    assert found[3][1][:4] == [*["ld.global"] * 3, "griddepcontrol.wait"]
    for _, names in (found[0], found[2]):
        assert not any("griddepcontrol" in name for name in names)


@pytest.mark.slow
def test_a_kernel_with_too_few_registers_is_seen_to_spill():
    registers, spills, _ = literal_eval(run_without_interpreter("-c", FORCED_SPILL))
    assert registers == 40 and spills > 0


def test_compiling_in_the_interpreter_says_what_to_do():
    from bita_kernels.accept_tree import shipped
    from bita_kernels.aot import compile_one

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_one("accept_tree", shipped()[0], 90)


@pytest.mark.slow
def test_keys_and_values_of_two_tiles_are_on_their_way(compiled):
    """One tile is worked on; with a single one after it, loads wait for memory and memory for loads."""
    context = [row for row in compiled if "splits" in row["configuration"]]
    on_tensor_cores = [row for row in context if row["needs_tensor_cores"] == "True"]
    assert len(on_tensor_cores) > 20 * len(COMPILED)
    assert not offenders(on_tensor_cores, lambda row: int(row["buffers"]) < 3)


@pytest.mark.parametrize(
    ("sm", "warps", "registers", "shared", "expected"),
    [
        (90, 4, 32, 0, 16),  # 16 x 4 warps x 32 threads x 32 registers = all there are
        (90, 4, 128, 0, 4),  # registers for 16 of 64 warps
        (90, 4, 33, 0, 12),  # handed out by 8 a thread: 40, so 12 blocks
        (90, 8, 64, 100 * 1024, 2),  # shared memory for two blocks
        (90, 1, 16, 0, 32),  # 32 blocks of one warp
        (89, 8, 64, 60 * 1024, 1),  # 100 KiB of shared memory
        (120, 8, 32, 0, 6),  # 48 warps
    ],
)
def test_resident_programs_of_known_cases(sm, warps, registers, shared, expected):
    assert resident_programs(LIMITS[sm], warps, registers, shared) == expected


def test_kernels_import_nothing_but_torch_and_triton():
    """Of all that could be installed with them."""
    program = (
        "import sys, bita_kernels.tree_attention, bita_kernels.aot; "
        "print([m for m in ('vllm', 'transformers', 'bita_vllm', 'safetensors') if m in sys.modules])"
    )
    assert run_without_interpreter("-c", program).strip() == "[]"

"""The CPU kernels against their twins, and what happens if they cannot be built. Attention: test_attention_cpu.py."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bita_kernels import cpu_kernels
from bita_kernels.add_mask_lora_cpu_naive import add_mask_lora_cpu_naive, pack_mask_lora
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from bita_kernels.top_tokens_cpu_naive import top_tokens_cpu_naive

pytestmark = pytest.mark.usefixtures("two_threads")


def case(dtype, num_mask_rows, rank, num_parts, size_in=70, part_size=37):
    generator = torch.Generator().manual_seed(num_mask_rows)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    parts = torch.tensor(
        [[3 + i * part_size, 3 + (i + 1) * part_size] for i in range(num_parts)], dtype=torch.int32
    )
    output, x = randn(40, 8 + num_parts * part_size), randn(40, size_in + 5)[:, :size_in]
    lora_a, lora_b = randn(num_parts * rank, size_in), randn(rank, output.shape[1]).T
    rows = torch.full((50,), 39)
    rows[:num_mask_rows] = torch.randperm(39, generator=generator)[:num_mask_rows].sort().values
    return output, x, lora_a, lora_b, parts, rows, torch.tensor([num_mask_rows])


def packed(lora_a, lora_b, parts, *rows):
    return *pack_mask_lora(lora_a.float(), lora_b.float(), parts), parts, *rows


@pytest.mark.parametrize("kind", ["kernel", "twin"])
@pytest.mark.parametrize("num_mask_rows", [0, 1, 3, 4, 9, 38])
@pytest.mark.parametrize("rank, num_parts", [(1, 1), (16, 3), (37, 2)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
    ids=str,
)
def test_deltas_are_those_of_float64(dtype, tolerance, rank, num_parts, num_mask_rows, kind):
    assert cpu_kernels.register(), "it must be built here"
    operation = torch.ops.bita.add_mask_lora_cpu if kind == "kernel" else add_mask_lora_cpu_naive
    output, x, *deltas = case(dtype, num_mask_rows, rank, num_parts)
    doubles = [t.double() if t.is_floating_point() else t for t in (output.clone(), x, *deltas)]
    add_mask_lora_naive(*doubles)
    added = output.clone()
    operation(added, x, *packed(*deltas))
    scale = doubles[0].abs().max()
    assert (added.double() - doubles[0]).abs().max() <= tolerance * scale
    untouched = torch.ones(len(output), dtype=torch.bool)
    untouched[deltas[3][:num_mask_rows]] = False
    assert torch.equal(added[untouched], output[untouched])


def test_a_mask_row_alone_gets_the_same_bits():
    cpu_kernels.register()
    output, x, *deltas, rows, num = case(torch.float32, 9, 16, 3)
    deltas = packed(*deltas)
    together = output.clone()
    torch.ops.bita.add_mask_lora_cpu(together, x, *deltas, rows, num)
    for row in rows[:9]:
        alone = output.clone()
        torch.ops.bita.add_mask_lora_cpu(alone, x, *deltas, row[None], torch.tensor([1]))
        assert torch.equal(alone[row], together[row])


def test_deltas_that_bfloat16_would_round_stay_in_fp32():
    a, b, parts = torch.ones(6, 8), torch.ones(40, 3), torch.tensor([[0, 20], [20, 40]])
    assert [t.dtype for t in pack_mask_lora(a, b, parts)] == [torch.bfloat16] * 2
    b[30, 1] += 2**-20
    assert [t.dtype for t in pack_mask_lora(a, b, parts)] == [torch.bfloat16, torch.float32]


def test_deltas_of_another_layer_are_refused():
    cpu_kernels.register()
    output, x, *deltas = case(torch.float32, 3, 16, 3)
    with pytest.raises(RuntimeError, match="as pack_mask_lora leaves them"):
        torch.ops.bita.add_mask_lora_cpu(output, x[:, 1:], *packed(*deltas))
    a, b, *others = packed(*deltas)
    with pytest.raises(RuntimeError, match="as pack_mask_lora leaves them"):
        torch.ops.bita.add_mask_lora_cpu(output, x, a, b[:-1], *others)


@pytest.mark.parametrize("kind", ["kernel", "twin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [7, 256, 1000, 49152])
def test_top_tokens_and_their_probabilities(kind, dtype, size):
    assert cpu_kernels.register(), "it must be built here"
    operation = torch.ops.bita.top_tokens_cpu if kind == "kernel" else top_tokens_cpu_naive
    logits = (torch.randn(9, size, generator=torch.Generator().manual_seed(size)) * 4).to(dtype)
    logits[3, : size // 2] = float("-inf")
    rows = torch.tensor([8, 0, 3])
    tokens, probabilities = operation(logits, rows, 5)
    exact = logits[rows].double().softmax(dim=-1)
    assert (tokens.sort().values.diff() > 0).all(), "a token twice"
    torch.testing.assert_close(
        exact.gather(1, tokens), exact.topk(5).values, rtol=1e-12, atol=0.0
    )  # of equal ones any
    torch.testing.assert_close(
        probabilities.double(), exact.gather(1, tokens), rtol=1e-4, atol=1e-9
    )
    assert operation(logits, rows[:0], 5)[0].shape == (0, 5)


def test_an_installed_package_has_the_sources(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True)
    for source in cpu_kernels.SOURCES + cpu_kernels.HEADERS:
        assert (tmp_path / "bita_kernels" / source.name).is_file()


def test_a_build_is_made_once(tmp_path, monkeypatch, one_source):
    made = cpu_kernels.build(tmp_path)
    monkeypatch.setattr(cpu_kernels, "FLAGS", [*cpu_kernels.FLAGS])
    modified = made.stat().st_mtime_ns
    assert cpu_kernels.build(tmp_path) == made and made.stat().st_mtime_ns == modified
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


@pytest.mark.parametrize(
    "setting, says",
    [
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler"),
        ({"PATH": "/nowhere"}, "neither g++ nor clang\\+\\+ is on the PATH"),
        ({"CXX": "false"}, "false: failed"),
    ],
)
def test_no_compiler(tmp_path, monkeypatch, setting, says):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cpu_kernels.BuildError, match=says.replace("g++", "g\\+\\+", 1)):
        cpu_kernels.build(tmp_path)


@pytest.fixture
def one_source(monkeypatch):
    """The kernel that moves KV only, which compiles in a few seconds."""
    monkeypatch.setattr(cpu_kernels, "SOURCES", [cpu_kernels.FOLDER / "move_kv_cpu.cpp"])
    monkeypatch.setattr(cpu_kernels, "FLAGS", [f for f in cpu_kernels.FLAGS if f != "-O3"])
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(ctypes.CDLL(path)))
    return loaded


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, caplog, one_source):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITA_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cpu_kernels.logger, "propagate", True)
    cpu_kernels.load()
    assert len(one_source) == 1
    (record,) = caplog.records
    sentence = record.getMessage()
    assert "compiled at every start" in sentence and "Not a directory" in sentence
    assert "BITA_CACHE" in sentence and "\n" not in sentence


def test_a_damaged_build_is_made_anew(tmp_path, monkeypatch, one_source):
    monkeypatch.setenv("BITA_CACHE", str(tmp_path))
    library = cpu_kernels.build(cpu_kernels.cache_folder())
    library.write_bytes(library.read_bytes()[:1000])
    cpu_kernels.load()
    assert len(one_source) == 1
    assert list(cpu_kernels.cache_folder().iterdir()) == [library]


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("BITA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_kernels.cache_folder() == tmp_path / "bita" / "kernels"

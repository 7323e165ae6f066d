"""`benchmarks/kernel_benchmark.py`: what one point's failure may cost, and when a row is on the disk."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import kernel_benchmark as kernels
import kernel_providers
import pytest
import torch
from kernel_cases import SHAPES, Case
from kernel_providers import PROVIDERS, Provider, Unavailable

ARGV = ["--quick", "--device", "cpu", "--context", "16", "--requests", "1", "2", "--rows", "4"]


def run(monkeypatch, folder: Path, *argv: str) -> list[dict[str, str]]:
    out = folder / "kernels.csv"
    monkeypatch.setattr(kernels, "REPEATS", 3)
    monkeypatch.setattr(sys, "argv", ["kernel_benchmark.py", *ARGV, *argv, "--out", str(out)])
    kernels.main()
    return list(csv.DictReader(out.open()))


def test_a_point_that_fails_is_a_row_and_the_sweep_goes_on(monkeypatch, tmp_path, capsys):
    def broken(case):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(PROVIDERS, "flex", Provider(broken))
    rows = run(monkeypatch, tmp_path, "--provider", "flex", "sdpa", "naive")
    assert [row["provider"] for row in rows] == ["flex", "sdpa", "naive"] * 2
    failed = [row for row in rows if row["provider"] == "flex"]
    assert all(row["failure"].startswith("RuntimeError: operation not permitted") for row in failed)
    assert all("\n" not in row["failure"] and row["time_us"] == "" for row in failed)
    assert all(float(row["time_us"]) > 0 and row["failure"] == "" for row in rows[1:3])
    assert "operation not permitted" in capsys.readouterr().out


def test_rows_are_written_when_they_are_measured(monkeypatch, tmp_path):
    """A sweep that is killed keeps what it has."""

    def killed(case):
        raise KeyboardInterrupt

    monkeypatch.setitem(PROVIDERS, "naive", Provider(killed))
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "--provider", "sdpa", "naive")
    (row,) = csv.DictReader((tmp_path / "kernels.csv").open())
    assert row["provider"] == "sdpa"
    assert row["git_sha"]


def test_the_table_needs_no_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(monkeypatch, tmp_path, "--provider", "sdpa")
    output = capsys.readouterr().out
    assert "share_of_floor" in output
    assert "matplotlib" in output


def test_flex_compiles_for_three_cases_only(monkeypatch, tmp_path):
    monkeypatch.setitem(PROVIDERS, "flex", replace(PROVIDERS["flex"], make=PROVIDERS["sdpa"].make))
    rows = run(monkeypatch, tmp_path, "--provider", "flex", "--rows", "1", "2", "4")
    assert len(rows) == 3


def test_naive_reads_the_device_so_it_has_no_row_on_cuda():
    case = Case(SHAPES["SmolLM2-135M"], 16, 1, 4, torch.float32, torch.device("cpu"))
    case.device = torch.device("cuda")
    with pytest.raises(Unavailable, match="reads the device"):
        kernel_providers.naive(case)


def test_tiles_are_those_of_an_engine_that_serves_the_longest_sequences():
    def config(max_model_len: int):
        case = Case(
            SHAPES["SmolLM2-135M"], 16, 1, 4, torch.float32, torch.device("cpu"), max_model_len
        )
        return kernel_providers.attention_config(case)

    from bita_kernels.attention_config import AttentionConfig

    engine = AttentionConfig.choose(64, torch.float32, 3, 4, num_kv_heads=3)
    assert config(131072) == config(8) == engine, "whatever the longest sequence"


def test_causal_peers_are_compared_with_causal_attention():
    case = Case(SHAPES["SmolLM2-135M"], 16, 2, 16, torch.float64, torch.device("cpu"))
    tree = PROVIDERS["sdpa"].make(case)(0)
    case.ancestors = torch.ones(16, 16, dtype=torch.bool).tril()
    causal = PROVIDERS["sdpa"].make(case)(0)
    case.ancestors = Case(case.shape, 16, 2, 16, case.dtype, case.device).ancestors
    assert case.error(tree, causal=False) < 1e-6 < 1e-3 < case.error(tree, causal=True)
    assert case.error(causal, causal=True) < 1e-6

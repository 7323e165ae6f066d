"""Every part of `make gpu-suite` runs to its end, with `--dry` on a CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.requests import KINDS
from testbed.engines import ON_GPU_RUNNER

from bita_vllm.tree.ladder import Ladder

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder of a run of every part."""
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--dry", "--out", folder]
    command += ["--part", "tokens", "throughput", "steps", "training"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-3000:])
    assert done.returncode == 0
    return folder


def rows(out: Path, name: str) -> list[dict[str, str]]:
    found = list(csv.DictReader((out / f"{name}.csv").open()))
    assert all(row["git_sha"] and row["device"] for row in found)
    return found


def test_tokens_of_every_kind_of_request_are_plain_vllms(out):
    found = rows(out, "tokens-tiny")
    assert [row["kind"] for row in found] == list(KINDS)
    for row in found:
        assert row["failure"] == ""
        assert row["identical"] == row["prompts"] == "3", row
    assert int(next(row for row in found if row["kind"] == "prefix cache")["cached_tokens"]) > 0


def test_throughput_has_both_arms_under_both_loads(out):
    found = rows(out, "throughput-tiny")
    assert {(row["arm"], row["load"]) for row in found} == {
        (arm, load) for arm in ("plain", "bita") for load in ("closed", "arrivals")
    }
    assert all(float(row["tokens_per_second"]) > 0 for row in found)
    accepted = [float(row["accepted_length"]) for row in found if row["arm"] == "bita"]
    assert max(accepted) > 1.2, "acceptance is imposed"
    assert all(float(row["accepted_length"]) == 1 for row in found if row["arm"] == "plain")
    assert "accepted x plain/step" in (out / "throughput.txt").read_text()


def test_steps_leave_a_ladder_and_the_kernels_rows(out):
    (path,) = out.glob("ladder-*.json")
    Ladder.load(path).check(3)
    assert {(row["requests"], row["rows"]) for row in rows(out, "steps")} == {
        (n, r) for n in ("1", "2") for r in ("1", "4", "8")
    }
    by_context = rows(out, "contexts")
    assert {(row["arm"], row["requests"]) for row in by_context} == {
        (arm, n) for arm in ("plain", "bita 16 rows") for n in ("1", "2")
    }
    assert all(float(row["step_ms"]) > 0 for row in by_context)
    assert {row["provider"] for row in rows(out, "kernels_dry")} == {"sdpa", "naive"}


def test_training_says_why_xformers_has_no_figures_on_a_cpu(out):
    (row,) = rows(out, "training")
    assert row["way"] == "mask rows, xformers"
    assert row["failure"]
    assert row["seconds_median"] == ""


def test_everything_fits_into_a_folder_of_a_few_files_a_part(out):
    for part in ("tokens", "throughput", "steps", "training"):
        assert (out / f"{part}.txt").read_text().rstrip().endswith(str(out))

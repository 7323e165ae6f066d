"""`make gpu-suite` runs to its end, with `--dry` on a CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.engines import ON_GPU_RUNNER

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]


def test_dry_run_measures_every_part(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--dry", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    rows = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert rows.keys() == {"gpu_correctness", "gpu_steps", "gpu_throughput", "kernels_dry"}
    (correct,) = rows["gpu_correctness"]
    assert correct["identical"] == correct["prompts"] == "3"
    assert correct["prefill"] == "Triton"
    assert {row["arm"] for row in rows["gpu_steps"]} == {"plain", "bita 16 rows"}
    assert all(float(row["step_ms"]) > 0 and row["git_sha"] for row in rows["gpu_steps"])
    assert all(row["identical"] in ("2/2", "4/4") for row in rows["gpu_throughput"])

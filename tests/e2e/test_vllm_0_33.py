"""The GPU runner's tests on vLLM 0.33, the version for GPUs; CI's own is 0.32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_0_33
from testbed.engines import ON_GPU_RUNNER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]


# Of the shipped sets those of a few budgets: all of them take nine minutes (`python tests/vllm_0_33.py` makes the
# overlay to run them on).
SOME = " or ".join(f"deltas-{rows}]" for rows in (12, 16, 64))


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("gpu_runner", ""), ("gpu_copies", ""), ("structured_output", ""), ("shipped_sets", SOME)],
)
def test_passes(name, chosen):
    try:
        overlay = vllm_0_33.overlay_dir()
    except subprocess.CalledProcessError:
        pytest.skip("vLLM 0.33's wheel cannot be downloaded here")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(overlay)
    asked = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert asked.stdout.split() == [vllm_0_33.VERSION], asked.stderr
    file = Path(__file__).with_name(f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "--runner", "gpu", "-k", chosen, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0

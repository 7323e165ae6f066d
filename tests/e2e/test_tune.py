"""`bita tune` on the real engine: times steps, writes a ladder that serving takes, reuses what it timed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from e2e.engines import make_adapter
from testbed.engines import ON_GPU_RUNNER, in_this_process, torch_threads
from vllm.platforms.cpu import CpuPlatform

from bita_vllm import cli
from bita_vllm.embedded import embedded_model_dir
from bita_vllm.tree.ladder import LADDER_FILE, Ladder
from bita_vllm.tree.ladder_search import choose_ladder
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.step_cost import MeasuredCost
from bita_vllm.tuning import answers, profile

SHIPPED = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"


def schedule_ahead(monkeypatch):
    """As on a GPU: vLLM's CPU platform turns async scheduling off."""
    stock = CpuPlatform.check_and_update_config

    def on_gpu(cls, config):
        stock(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(on_gpu))


def test_tune_writes_the_ladder_of_this_machine(tiny_model, tmp_path, capsys, monkeypatch):
    """Both runners."""
    model = tiny_model("llama", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    argv = [
        "tune", str(adapter), "--requests", "1", "3", "--rows", "4", "12", "--steps", "4",
        "--max-num-seqs", "5", "--dtype", "float32",
        "--engine-args", json.dumps({"enforce_eager": True, "block_size": 32}),
    ]  # fmt: skip
    configs, timed = [], profile.profile_steps

    def timing(llm, *args):
        configs.append(llm.llm_engine.vllm_config)
        return timed(llm, *args)

    monkeypatch.setattr(profile, "profile_steps", timing)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # stronger than any argument
    if ON_GPU_RUNNER:
        schedule_ahead(monkeypatch)
        # As few rounds as there can be: the interpreter takes its time.
        monkeypatch.setattr(profile, "PRECISION", 10.0)
        monkeypatch.setattr(profile, "MOST_WARM_UPS", 1)
        few = {"NUM_ANSWERS": 2, "MOST_ATTEMPTS": 1, "PROMPT_TOKENS": 8, "ANSWER_TOKENS": 8}
        for name, value in few.items():
            monkeypatch.setattr(answers, name, value)
    with torch_threads(1), in_this_process():
        assert cli.main(argv) == 0
    (config,) = configs
    assert config.use_v2_model_runner == config.scheduler_config.async_scheduling == ON_GPU_RUNNER
    assert config.cache_config.kv_cache_memory_bytes < 2**24, "no more memory than it needs"
    ladder = Ladder.load(adapter / LADDER_FILE)
    ladder.check(3)
    assert len(ladder.lookup(5)) == 6
    points = ladder.provenance["step_seconds"]
    print(points)
    assert [n for n, *_ in points] == [1, 1, 1, 3, 3, 3]
    for n in (1, 3):
        rows = [r for m, r, *_ in points if m == n]
        assert rows[0] == 1
        if ON_GPU_RUNNER:
            assert rows[1:] == [4, 12], "blocks are padded"
        else:
            assert 2 <= rows[1] <= 4
            assert 9 <= rows[2] <= 12
    assert all(0 < seconds < 5 for _, _, seconds, _ in points)
    assert all((spread > 0) == (rows > 1) for _, rows, _, spread in points)
    assert ladder.provenance["device"]
    cost, acceptance = MeasuredCost(points), acceptance_table(None, 3)
    expected, _ = choose_ladder(acceptance, cost, 5, padded=ON_GPU_RUNNER)
    assert ladder.batch_sizes == list(expected.batch_sizes)
    output = capsys.readouterr()
    assert "to plain" in output.out
    assert "no acceptance statistics" in output.err
    assert "taken from the adapter's statistics alone" in output.err, "a random model never ends"
    assert ladder.provenance["answers"] is None
    assert ladder.provenance["acceptance_reached"] == 1

    with in_this_process():
        assert cli.main(argv) == 0  # at once: the steps are not timed again
    assert "step times are taken from" in capsys.readouterr().out
    assert Ladder.load(adapter / LADDER_FILE).provenance["step_seconds"] == points
    assert len(configs) == 1


@pytest.mark.skipif(ON_GPU_RUNNER, reason="a model that can write takes the interpreter too long")
def test_what_a_models_own_answers_say_goes_into_the_ladder(tmp_path, capsys, monkeypatch):
    """The shipped adapter on its model, with the template sets that serving has."""
    monkeypatch.setattr(profile, "PRECISION", 10.0)
    monkeypatch.setattr(profile, "MOST_WARM_UPS", 1)
    monkeypatch.setattr(answers, "NUM_ANSWERS", 6)
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 96)
    out = tmp_path / "ladder.json"
    argv = [
        "tune", str(SHIPPED), "--model", str(embedded_model_dir()), "--requests", "6", "--rows", "8",
        "--max-num-seqs", "6", "--out", str(out), "--engine-args", json.dumps({"enforce_eager": True}),
    ]  # fmt: skip
    with torch_threads(1), in_this_process():
        assert cli.main(argv) == 0
    provenance = Ladder.load(out).provenance
    served = answers.Answers(*provenance["answers"])
    assert served.rows == 8
    assert served.steps > 200, "that many say something"
    assert 1.4 < served.accepted_length < 2.4, "2.0 by the adapter's statistics"
    assert 0.5 < provenance["acceptance_reached"] < 1.2
    sentence = " ".join(capsys.readouterr().out.split())
    assert f"came with {served.accepted_length:.2f} a step in blocks of 8 rows" in sentence


@pytest.mark.skipif(ON_GPU_RUNNER, reason="the command in a process of its own, on the CPU")
def test_sigterm_while_steps_are_timed_leaves_nothing(tiny_model, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    files = sorted(os.listdir(adapter))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = {"enforce_eager": True, "block_size": 32}
    command = [sys.executable, "-m", "bita_vllm.cli", "tune", str(adapter), "--requests", "1"]
    command += ["--rows", "4", "--steps", "1000000", "--dtype", "float32", "--max-num-seqs", "2"]
    env = {**os.environ, "TMPDIR": str(scratch), "VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--engine-args", json.dumps(options)], env=env, stdout=out, stderr=out
        )
    try:
        me, deadline = psutil.Process(process.pid), time.monotonic() + 120
        while "init engine" not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        processes = [me, *me.children(recursive=True)]
        assert list(scratch.iterdir())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    lines = [line for line in log.read_text().splitlines() if line]
    assert [line for line in lines if line.startswith("bita: ")] == lines[-1:]
    assert "Ended by SIGTERM" in lines[-1] and "Traceback" not in log.read_text()
    # vLLM keeps the file over which its ranks have met.
    assert [path for path in scratch.iterdir() if "vllm_dist" not in path.name] == []
    assert sorted(os.listdir(adapter)) == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "2"], "at least 1 request and 3 rows"),
        (["--steps", "1"], "--steps is 1, but must be at least 2"),
        (["--engine-args", "[]"], "no JSON object"),
    ],
)
def test_bad_options_are_one_sentence(tiny_model, tmp_path, capsys, options, message):
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    capsys.readouterr()
    assert cli.main(["tune", str(adapter), *options]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bita: ")
    assert message in error
    assert "\n" not in error

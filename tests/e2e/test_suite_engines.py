"""The engines of `make gpu-suite`: processes that take turns, and what is left of one that cannot start."""

import gpu.engines
import pytest
from gpu.engines import Arm, Engines, Failed, Task
from gpu.machine import Machine
from gpu.models import make_adapter, some_prompts
from gpu.requests import answer
from testbed.engines import ON_GPU_RUNNER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU_RUNNER, reason="processes of their own: not interpreted"),
]
OPTIONS = {
    "async_scheduling": False,  # the CPU runner has none
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 2**26,
    "block_size": 32,
}
LIMIT_S = 1800.0  # ends a hang; three engines start in half a minute, on a busy machine in minutes


def test_two_processes_answer_in_turn_and_a_third_says_why_it_did_not_start(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu.engines, "START_LIMIT", LIMIT_S)
    model = tiny_model("llama", num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", model)
    arms = [
        Arm("plain", model, OPTIONS),
        Arm("bita", model, OPTIONS, {"model": str(adapter), "tree": "2,1"}),
        Arm("broken", model, OPTIONS, {"model": str(tmp_path / "nothing")}),
    ]
    machine = Machine("tokens", tmp_path, tmp_path, None, adapter, LIMIT_S, False, {})
    arguments = {"prompts": some_prompts(2, 8, 512), "max_tokens": 6}
    tasks = [
        Task(kind, answer, {**arguments, "kind": kind}, seconds=LIMIT_S / 8)
        for kind in ("greedy", "seeded")
    ]
    found = {
        (arm, task.name): result for arm, task, result in Engines(machine, arms).answers(tasks)
    }
    for kind in ("greedy", "seeded"):
        assert found["plain", kind]["tokens"] == found["bita", kind]["tokens"]
        assert isinstance(found["broken", kind], Failed)
    assert machine.failed == ["broken, its start"], "tried once"
    log = machine.log.read_text()
    assert "--- plain" in log and "--- bita" in log
    assert "nothing" in (tmp_path / "tokens.txt").read_text()

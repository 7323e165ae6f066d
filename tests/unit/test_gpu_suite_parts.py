"""The parts of `make gpu-suite` without an engine: what they compute, and what they plan."""

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from bita_kernels.accept_tree import accept_tree_naive
from bita_kernels.tree_table import TreeTable
from gpu import engines
from gpu.engines import Arm, Engines, Failed, Task
from gpu.imposed import Imposing, imposed_targets
from gpu.machine import Machine, RowFile
from gpu.models import acceptance_of, make_adapter, make_shape
from gpu.report import EAGLE_3, interval, ratios
from gpu.requests import figures
from gpu.throughput import arriving_tasks, closed_tasks
from gpu.tokens import beside_plain, differences
from testbed.recorded_ranks import recorded_ranks

from bita_vllm.tree import Template, TemplateTable

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def step(table: TreeTable, tokens: torch.Tensor, lines: list[int]) -> dict:
    """Arguments of accept_tree: whole blocks, one after the other, a target for every row."""
    num_requests, rows = len(lines), table.num_rows
    first = int32([i * rows for i in range(num_requests)])
    steps = table.max_depth + 1
    return {
        "target_tokens": torch.full((num_requests * rows,), 500),
        "row_tokens": tokens.flatten(),
        "first_target": first,
        "first_row": first,
        "num_rows": int32([rows] * num_requests),
        "line": int32(lines),
        "emitting": torch.ones(num_requests, dtype=torch.bool),
        "first_mask": torch.zeros(num_requests, dtype=torch.int32),
        "table": table,
        # and line and last node
        "tokens": torch.zeros(num_requests, steps + 2, dtype=torch.int64),
        "path": torch.zeros(num_requests, steps, dtype=torch.int32),
        "num_emitted": torch.zeros(num_requests, dtype=torch.int32),
        "next_depths": torch.zeros(num_requests, dtype=torch.int32),
        "mask_rows": torch.zeros(num_requests, steps - 1, dtype=torch.int32),
    }


def walked_by_hand(table: TreeTable, line: int, wanted: list[int]) -> list[int]:
    """Rows that a walk takes if the answer's token at depth d has rank wanted[d - 1]."""
    path, nodes = [0], int(table.num_nodes[line])
    while True:
        depth = len(path)
        for row in range(1, nodes):
            rank, parent = int(table.rank[line, row]), int(table.parent[line, row])
            if parent == path[-1] and depth <= len(wanted) and rank == wanted[depth - 1]:
                path.append(row)
                break
        else:
            return path


@pytest.mark.parametrize("widths", [[1], [2, 1], [5, 4, 3]], ids=str)
def test_imposed_targets_walk_along_the_wanted_ranks(widths):
    table = TreeTable.of(TemplateTable(Template.from_widths(widths, 3)), "cpu")
    rng = np.random.default_rng(0)
    last = len(table.num_depths) - 1
    for _ in range(30):
        lines = rng.integers(-1, last + 1, 6).tolist()
        tokens = torch.from_numpy(np.stack([rng.permutation(90)[: table.num_rows] for _ in lines]))
        wanted = rng.integers(0, 6, (6, 3))
        given = step(table, tokens, lines)
        given["target_tokens"] = imposed_targets(
            given["target_tokens"], given["row_tokens"], given["first_target"], given["first_row"],
            given["num_rows"], given["line"], table.parent, table.rank, table.depth,
            table.mask_index, int32(wanted.tolist()),
        )  # fmt: skip
        accept_tree_naive(**given)
        for i, line in enumerate(lines):
            want = [0] if line < 0 else walked_by_hand(table, line, wanted[i].tolist())
            assert int(given["num_emitted"][i]) == len(want)
            assert given["path"][i, : len(want)].tolist() == want


def test_every_request_reads_on_in_its_recorded_answer():
    table = TreeTable.of(TemplateTable(Template.from_widths([5, 4, 3], 3)), "cpu")
    ranks = np.concatenate(recorded_ranks("mt_bench"))
    imposing = Imposing(accept_tree_naive, torch.from_numpy(ranks))
    line, found = len(table.num_depths) - 1, []
    for _ in range(40):
        given = step(table, torch.arange(8 * table.num_rows).view(8, -1), [line] * 8)
        imposing(**given)
        found.append(given["num_emitted"].tolist())
    for request in range(8):
        place = 997 * request
        for emitted in found:
            assert emitted[request] == len(walked_by_hand(table, line, ranks[place].tolist()))
            place += emitted[request]
    print(f"accepted length {np.mean(found):.3f}")
    assert imposing.calls == 40


def test_an_adapter_of_a_large_shape_has_the_trained_ones_statistics(tmp_path):
    """The config alone: 300 MB of deltas are written on a GPU's machine."""
    model = make_shape(tmp_path / "model", "Llama-3-8B")
    adapter = make_adapter(tmp_path / "adapter", model, acceptance_of(ADAPTER))
    found, trained = acceptance_of(adapter), acceptance_of(ADAPTER)
    assert found["rank_probability"] == trained["rank_probability"]
    assert "template_sets" in trained and "template_sets" not in found


def test_a_ratio_is_taken_within_a_repeat():
    def row(arm, repeat, rate, step_ms):
        return {
            "load": "closed", "requests": "8", "repeat": repeat, "arm": arm, "tokens_per_second": rate,
            "accepted_length": 2.0 if arm == "bita" else 1.0, "step_ms": step_ms, "tpot_ms": 1.0,
        }  # fmt: skip

    rates = {"1": (100.0, 150.0), "2": (200.0, 300.0), "3": (50.0, 80.0)}
    rows = [row("plain", r, a, 5.0) for r, (a, _) in rates.items()]
    rows += [row("bita", r, b, 6.0) for r, (_, b) in rates.items()]
    rows.append({**row("bita", "1", "", ""), "load": "arrivals"})  # it failed
    (line,) = ratios(rows, "plain", EAGLE_3)
    assert line["ratio"] == f"{(1.5 * 1.5 * 1.6) ** (1 / 3):.3f}"
    assert line["accepted x plain/step"] == f"{2 * 5 / 6:.3f}"
    assert line["EAGLE-3"] == 1.62
    low, high = interval([1.5, 1.5, 1.6])
    assert line["interval"] == f"{low:.3f}-{high:.3f}"
    assert interval([1.5])[1] == math.inf


def test_figures_leave_out_the_token_of_the_prefill():
    found = figures([[1, 2, 3, 4, 5]], [[0.0, 1.0, 2.0, 3.0]], [0.5, 0.7, 0.6], 3.0)
    assert found["accepted_length"] == 2.0  # four tokens in two steps
    assert found["step_ms"] == 600.0
    assert found["ttft_ms"] == 1000.0
    assert found["tpot_ms"] == 500.0


def test_a_difference_is_reported_with_plain_vllms_gap():
    plain = {"tokens": [[1, 2, 3], [4, 5]], "cached_tokens": 0, "seconds": 1}
    bita = {**plain, "tokens": [[1, 9, 3], [4]]}
    assert list(differences(bita["tokens"], plain["tokens"])) == [(0, 1, 2, 9), (1, 1, 5, -1)]
    gaps = [[(-0.1, 1.0), (-0.7, 0.003), (-0.1, 2.0)], [(-0.1, 1.0), (-0.2, 3.0)]]
    row = beside_plain(
        {**bita, "logprobs": [[], []]}, {**plain, "logprobs": [[], []]}, {"logprobs": gaps}
    )
    assert row["identical"] == 0
    assert row["largest_gap"] == 3.0
    assert row["request_position_plain_bita_gap"] == "0:1:2:9:0.003 1:1:5:-1:3.0"
    assert beside_plain(Failed("it died"), plain, None) == {"failure": "bita: it died"}


def test_a_row_is_on_the_disk_when_it_has_been_added(tmp_path):
    file = RowFile(tmp_path / "rows.csv", ("arm", "failure"), {"device": "a GPU"})
    file.add({"arm": "plain"})
    (row,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert row == {"arm": "plain", "failure": "", "device": "a GPU"}
    with pytest.raises(ValueError, match="no column for typo"):
        file.add({"typo": 1})


def test_all_arms_get_the_same_arrivals_and_warm_up_is_repeat_0():
    prompts = [[1, 2]] * 256
    first, again = (arriving_tasks(prompts, 64, True) for _ in range(2))
    assert [task.arguments for task in first] == [task.arguments for task in again]
    names = [task.name for task in closed_tasks(prompts, (1, 256), 64, True, 8)]
    assert names[:2] == ["closed 1 0", "closed 256 0"]
    assert len(names) == 8


def test_the_plan_fits_every_part_into_its_limit():
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in heads] == ["tokens", "throughput", "steps"]
    for line in heads:
        seconds = int(line.split(":")[1].split(" s")[0])
        assert seconds <= 540, line


def test_what_does_not_fit_is_named(tmp_path):
    machine = Machine("tokens", tmp_path, tmp_path, None, tmp_path, 0.0, False, {})
    machine.fail("memcheck", "not run: 0 s left")
    assert machine.failed == ["memcheck"]
    assert "memcheck: not run" in (tmp_path / "tokens.txt").read_text()


class FragileWorker:
    """An engine's process that dies of the task named 'syncs' as long as it is checked."""

    started: ClassVar[list] = []

    def __init__(self, arm, log):
        self.arm = arm
        self.started.append((arm.name, arm.checked))

    def receive(self, seconds):
        pass

    def ask(self, task, seconds):
        if self.arm.checked and task.name == "syncs":
            raise Failed("GPU<->CPU sync detected")
        return f"{self.arm.name} {task.name}"

    def close(self):
        pass


def test_an_engine_that_a_check_ends_answers_without_it(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "Worker", FragileWorker)
    monkeypatch.setattr(FragileWorker, "started", [])
    machine = Machine("tokens", tmp_path, tmp_path, None, tmp_path, 540.0, False, {})
    arms = [Arm("plain", tmp_path), Arm("bita", tmp_path, bita={}, checked=True)]
    both = Engines(machine, arms)
    tasks = [Task(name, print, {}) for name in ("first", "syncs", "last")]
    answers = [(arm, task.name, result) for arm, task, result in both.answers(tasks)]
    assert [answer[:2] for answer in answers] == [
        ("plain", "first"), ("bita", "first"), ("bita", "syncs"), ("plain", "syncs"),
        ("plain", "last"), ("bita", "last"),
    ]  # fmt: skip
    assert all(result == f"{arm} {name}" for arm, name, result in answers)
    assert FragileWorker.started == [("plain", False), ("bita", True), ("bita", False)]
    assert not both.checked("bita")
    assert machine.failed == ["bita, syncs"]


def test_vllm_has_the_checks_that_the_suite_asks_for():
    import vllm.envs as envs
    from vllm.engine.arg_utils import EngineArgs

    assert "jit_monitor_mode" in EngineArgs.__dataclass_fields__
    assert "VLLM_GPU_SYNC_CHECK" in envs.environment_variables

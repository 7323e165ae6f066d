"""What bita writes is there whole or not at all: on a full disk, for readers at the same time, for several writers."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bita_vllm.adapter.checkpoint import Adapter, random_adapter, save_adapter
from bita_vllm.adapter.config import AdapterConfig, ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.system.atomic_write import write_bytes, write_csv
from bita_vllm.training.checkpoint import save_checkpoint
from bita_vllm.training.curves import Curve
from bita_vllm.training.eval_command import _write_csv
from bita_vllm.training.evaluate import save_acceptance
from bita_vllm.training.samples import Sample, SampleWriter, read_samples
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder

SHAPE = ModelShape(num_layers=2, hidden_size=64, num_kv_heads=2, head_size=32, vocab_size=512)
LIMIT = 150  # bytes of a file; all that is written here is longer
TEMPLATE = Template.from_widths([5, 4, 3], 3)
HEADER = {"model": "m", "revision": None, "settings": {}}
LADDER = Ladder.fixed(TEMPLATE)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond LIMIT: the system refuses what comes after it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def adapter(seed: int) -> Adapter:
    return random_adapter(SHAPE, 3, 4, seed)


def _acceptance(folder: Path) -> None:
    save_acceptance(folder, {"note": "x" * 1000})


def _deltas(folder: Path) -> None:
    deltas = {"model.layers.0.mlp.up_proj": (torch.ones(8, 64), torch.ones(64, 8))}
    MaskLoraWeights(8, 1.0, deltas).save(folder / "mask_lora", "base", 2)


def _checkpoint(folder: Path) -> None:
    parameters = {"a": torch.nn.Parameter(torch.ones(200))}
    save_checkpoint(folder / "training.safetensors", parameters, {}, {}, {}, 3)


def _table(folder: Path) -> None:
    versions = {f"version{i}": "x" * 20 for i in range(20)}
    result = {"accuracy": {}, "versions": versions, "trees": [{"tree": "auto", "rows": 4}]}
    _write_csv(folder / "table.csv", result)


def _samples(folder: Path) -> None:
    writer = SampleWriter(folder / "data.jsonl", HEADER)
    writer.append([Sample([1] * 40, [2] * 40)])
    writer.append([Sample([3] * 40, [4] * 40)])


WRITERS = {
    "adapter": lambda folder: save_adapter(folder, adapter(1)),
    "deltas": _deltas,
    "statistics": _acceptance,
    "ladder": lambda folder: LADDER.save(folder / LADDER_FILE),
    "template": lambda folder: TEMPLATE.save(folder / "tree.json"),
    "checkpoint": _checkpoint,
    "table": _table,
    "samples": _samples,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_full_disk_is_one_sentence_and_changes_no_file(tmp_path, write):
    save_adapter(tmp_path, adapter(0))
    if write is _samples:
        SampleWriter(tmp_path / "data.jsonl", HEADER)
        write = lambda folder: SampleWriter(folder / "data.jsonl", HEADER).append(  # noqa: E731
            [Sample([3] * 400, [4] * 40)]
        )
    before = contents(tmp_path)
    with full_disk(), pytest.raises(ValueError) as error:
        write(tmp_path)
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before
    write(tmp_path)  # with room again
    assert contents(tmp_path) != before


def test_samples_before_a_full_disk_are_kept(tmp_path):
    _samples(tmp_path)
    path = tmp_path / "data.jsonl"
    writer = SampleWriter(path, HEADER)
    with full_disk(), pytest.raises(ValueError, match="before this batch are kept"):
        writer.append([Sample([5] * 400, [6])])
    assert [sample.prompt_ids[0] for sample in read_samples(path)] == [1, 3]
    writer.append([Sample([5] * 400, [6])])
    assert [sample.prompt_ids[0] for sample in read_samples(path)] == [1, 3, 5]


def test_the_curve_of_a_run_is_whole(tmp_path):
    curve = Curve(tmp_path, 1)
    curve.rows = [{"step": 1.0, "loss": 2.0}]
    curve.write()
    before = contents(tmp_path)
    curve.rows *= 100
    with full_disk(), pytest.raises(OSError):
        curve.write()
    assert contents(tmp_path) == before


def test_readers_see_whole_files_while_several_write(tmp_path):
    """As servers that start while `bita tune` and `bita eval` run, twice each."""
    save_adapter(tmp_path, adapter(0))
    ladders = [LADDER, Ladder.fixed(Template.from_widths([1], 1))]
    ladders[0].save(tmp_path / LADDER_FILE)
    files = sorted(contents(tmp_path))
    stop, failures = threading.Event(), []

    def again_and_again(write) -> None:
        number = 0
        while not stop.is_set():
            try:
                write(number)
            except Exception as error:
                failures.append(error)
                return
            number += 1

    def tune(number: int) -> None:
        ladders[number % 2].save(tmp_path / LADDER_FILE)

    def evaluate(number: int) -> None:
        save_acceptance(tmp_path, {"note": "x" * (10000 * (number % 2) + 1)})

    def train(number: int) -> None:
        save_adapter(tmp_path, adapter(number % 2))

    threads = [
        threading.Thread(target=again_and_again, args=[write])
        for write in (tune, tune, evaluate, evaluate, train)
    ]
    for thread in threads:
        thread.start()
    try:
        rows = {Ladder.load(tmp_path).widest.num_rows for _ in range(300)}
        for _ in range(100):
            assert AdapterConfig.load(tmp_path).num_mask_tokens == 3
            Adapter.load(tmp_path, SHAPE)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(rows) == 2, "nobody wrote while this test read"
    assert sorted(contents(tmp_path)) == files


def test_a_new_file_has_a_plain_files_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "ours", b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_replaced_not_followed(tmp_path):
    """A snapshot of the Hugging Face hub is made of links into a store that others share."""
    (tmp_path / "store").write_text("shared")
    (tmp_path / "config.json").symlink_to(tmp_path / "store")
    write_bytes(tmp_path / "config.json", b"own")
    assert (tmp_path / "store").read_text() == "shared"
    assert (tmp_path / "config.json").read_text() == "own"


def test_a_table_has_the_columns_of_its_first_row(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    assert (tmp_path / "t.csv").read_text().split() == ["a,b", "1,2", "3,4"]

"""What a profile asks of the engine, and which ladder files spare it."""

import json

import pytest
from tree_tools import sets_of_one

from bita_vllm.adapter.config import ModelShape
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder, LadderError
from bita_vllm.tree.step_cost import Point
from bita_vllm.tuning.answers import Answers
from bita_vllm.tuning.profile import graph_sizes, kv_cache_bytes, profile_ladder
from bita_vllm.tuning.tune_command import PROFILE_KEYS, _measured_before

LLAMA_8B = ModelShape(
    num_layers=32, hidden_size=4096, num_kv_heads=8, head_size=128, vocab_size=128256
)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(("requests", "tokens"), [(1, 197), (16, 250), (128, 369)])
def test_every_request_finds_its_kv_blocks(block, requests, tokens):
    bytes_a_block = block * 32 * 2 * 8 * 128 * 2
    blocks = kv_cache_bytes(LLAMA_8B, requests, tokens, bytes_a_value=2) // bytes_a_block
    needed = requests * -(-tokens // block) + 1  # vLLM keeps one for itself
    assert needed <= blocks <= needed + (requests + 1) * 128 // block + tokens


def test_every_width_is_named_but_for_the_batches_that_are_timed():
    """All of them plain: a profile sets its widths itself, from plain steps on."""
    templates = [Template.from_widths(widths, 3) for widths in ([1], [3, 2])]
    ladder = profile_ladder(sets_of_one(templates), 8)
    assert ladder.lookup(10).tolist() == [0] * 9 + ladder.widths


def test_graphs_are_captured_for_the_points_and_nothing_else():
    assert graph_sizes([1, 4], [3, 15]) == [1, 4, 16, 64]


def test_measured_before_an_older_ladder_file_are_timed_anew(tmp_path):
    """Else 'bita tune' would refuse the file that its message says to make again with it."""
    path, machine = tmp_path / "ladder.json", dict.fromkeys(PROFILE_KEYS, "this")
    provenance = {**machine, "step_seconds": [[1, 1, 0.5]]}
    Ladder(sets_of_one([Template.from_widths([1], 3)]), [(1, 1, 0)], provenance).save(path)
    assert _measured_before(path, machine) == ([Point(1, 1, 0.5)], None)
    with_answers = {**provenance, "answers": [8, 1500, 900]}
    Ladder(sets_of_one([Template.from_widths([1], 3)]), [(1, 1, 0)], with_answers).save(path)
    assert _measured_before(path, machine) == ([Point(1, 1, 0.5)], Answers(8, 1500, 900))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bita_ladder": 1}))
    assert _measured_before(path, machine) is None
    path.write_text("not a ladder")
    with pytest.raises(LadderError, match=r"cannot be read .*--again writes a new ladder"):
        _measured_before(path, machine)

"""`make soak` in small: mixed requests on a real server with bita, next to a plain one."""

import pytest
from e2e.engines import make_adapter
from e2e.servers import environment
from soak import faults, rows_of, soak, table
from soak_requests import MIX, count_by_kind, requests
from testbed.engines import ON_GPU_RUNNER
from transformers import AutoTokenizer
from tree_tools import sets_of_one

from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU_RUNNER, reason="server processes of their own, on the CPU runner"),
]
WIDE, NARROW = Template.from_widths([2, 1], 2), Template.from_widths([1], 1)
LADDER = Ladder(sets_of_one([WIDE, NARROW]), [(1, 4, WIDE.width), (5, 8, NARROW.width)])
NUM_REQUESTS, CLIENTS = 200, 12
FLAGS = [
    "--served-model-name",
    "tiny",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--block-size",
    "32",
]
FLAGS += ["--max-model-len", "2048", "--max-num-seqs", "8"]
FLAGS += [
    "--kv-cache-memory-bytes",
    str(66 * 2**13),
]  # 66 blocks: one longest request, or about five
# So few requests are all warm-up, in plain vLLM too (15%): `make soak` holds the 1%.
RSS_GROWTH = 0.05  # beyond plain vLLM's own


def test_nothing_is_lost_and_nothing_is_left_behind(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(
        "llama", num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=2048
    )
    adapter = make_adapter(model, tmp_path / "adapter")
    LADDER.save(tmp_path / "ladder.json")
    made = requests(NUM_REQUESTS, AutoTokenizer.from_pretrained(model), "tiny", 200, 48, seed=0)
    assert count_by_kind(made).keys() == MIX.keys()
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    bita = {"model": str(adapter), "ladder": str(tmp_path / "ladder.json")}
    result = soak(model, bita, FLAGS, made, CLIENTS, tmp_path)
    print(table(rows_of(result, made)))
    assert faults(result, made, "float32", RSS_GROWTH) == []

"""`bita shrink`: the best approximation of smaller rank, in a copy that loads."""

import json

import pytest
import torch

from bita_vllm import cli
from bita_vllm.adapter.checkpoint import Adapter, random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.training.shrink_command import shrink

SHAPE = ModelShape(num_layers=2, hidden_size=32, num_kv_heads=2, head_size=8, vocab_size=100)


def deltas(rank: int, alpha: float, seed: int = 0) -> MaskLoraWeights:
    torch.manual_seed(seed)
    modules = {
        f"model.layers.{i}.mlp.up_proj": (
            torch.randn(rank, 32, dtype=torch.float64),
            torch.randn(48, rank, dtype=torch.float64),
        )
        for i in range(2)
    }
    return MaskLoraWeights(rank, alpha, modules)


def products(weights: MaskLoraWeights) -> list[torch.Tensor]:
    return [weights.alpha / weights.rank * b @ a for a, b in weights.modules.values()]


@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_it_is_the_truncated_svd_of_the_product(alpha):
    whole = deltas(8, alpha)
    smaller, kept = shrink(whole, 3)
    energy = cut = 0.0
    for before, after in zip(products(whole), products(smaller), strict=True):
        u, s, v = torch.linalg.svd(before)
        torch.testing.assert_close(after, (u[:, :3] * s[:3]) @ v[:3])
        energy, cut = energy + float((s**2).sum()), cut + float((s[3:] ** 2).sum())
    assert kept == pytest.approx(1 - cut / energy)
    assert smaller.rank == 3


def test_nothing_is_lost_of_deltas_that_have_the_smaller_rank():
    small = deltas(3, 3.0)
    padded = MaskLoraWeights(
        8,
        8.0,
        {
            name: (torch.cat([a, a.new_zeros(5, 32)]), torch.cat([b, b.new_zeros(48, 5)], dim=1))
            for name, (a, b) in small.modules.items()
        },
    )
    again, kept = shrink(padded, 3)
    assert kept == pytest.approx(1.0)
    for before, after in zip(products(small), products(again), strict=True):
        torch.testing.assert_close(after, before)


@pytest.fixture
def adapter(tmp_path):
    made = random_adapter(SHAPE, 3, 4, seed=0, verifier="org/base")
    save_adapter(tmp_path / "whole", made)
    deltas(8, 8.0).save(tmp_path / "whole" / "mask_lora", "org/base", 2)
    config = tmp_path / "whole" / "config.json"
    raw = json.loads(config.read_text())
    raw["training"] = {"steps_done": 5}
    raw["acceptance"] = {"rank_probability": [[0.5]] * 3}
    config.write_text(json.dumps(raw))
    return tmp_path / "whole"


def test_the_copy_loads_and_says_where_it_comes_from(adapter, tmp_path, capsys):
    assert cli.main(["shrink", str(adapter), "--rank", "2", "--out", str(tmp_path / "small")]) == 0
    assert "rank 8 cut to 2" in capsys.readouterr().out
    small, whole = Adapter.load(tmp_path / "small"), Adapter.load(adapter)
    assert small.mask_lora.rank == 2
    assert torch.equal(small.mask_embeddings, whole.mask_embeddings)
    assert small.config.raw["training"] == {"steps_done": 5, "shrunk_to_rank": 2}
    assert small.config.acceptance is None
    assert whole.config.acceptance is not None


@pytest.mark.parametrize(
    ("rank", "out", "message"),
    [(8, "small", "expected 1 to 7"), (0, "small", "expected 1 to 7"), (2, "whole", "exists")],
)
def test_what_cannot_be_done_is_one_sentence(adapter, tmp_path, capsys, rank, out, message):
    argv = ["shrink", str(adapter), "--rank", str(rank), "--out", str(tmp_path / out)]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_without_deltas_has_nothing_to_cut(tmp_path, capsys):
    save_adapter(tmp_path / "plain", random_adapter(SHAPE, 3, 4, seed=0, verifier="org/base"))
    argv = ["shrink", str(tmp_path / "plain"), "--rank", "2", "--out", str(tmp_path / "small")]
    assert cli.main(argv) == 1
    assert "has no low-rank deltas" in capsys.readouterr().err

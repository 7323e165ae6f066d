"""Replayed walks take the steps of the naive decoder; statistics are what counting by hand gives."""

import csv
import json

import numpy as np
import pytest
import torch
from awkward_templates import TEMPLATES, naive
from naive_decoder import decode
from transformers import AutoModelForCausalLM

from bita_vllm import cli
from bita_vllm.adapter.checkpoint import Adapter, random_adapter, save_adapter
from bita_vllm.adapter.config import AdapterConfig, ModelShape
from bita_vllm.training.evaluate import (
    NUM_RANKS,
    acceptance_statistics,
    accepted_lengths,
    answer_predictions,
    answer_ranks,
    conditional_counts,
    mask_accuracy,
    parse_tree,
    save_acceptance,
)
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.samples import Sample, SampleWriter
from bita_vllm.tree import Template, TemplateError
from bita_vllm.tree.replay import NO_RANK, TreeWalker
from bita_vllm.tree.search import best_template

VOCAB_SIZE = 12  # so small that random drafts are often right
K = 3


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=2)


@pytest.fixture
def adapter(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    adapter = random_adapter(
        ModelShape.from_hf_config(config),
        K,
        4,
        0,
        embedding_std=0.15,
        prompt_std=0.5,
        verifier=str(model),
    )
    save_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


def load(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_replay_takes_the_steps_of_the_naive_decoder(model, adapter, template):
    rng = np.random.default_rng(7)
    base, weights = load(model), Adapter.load(adapter)
    samples, expected = [], []
    for _ in range(8):
        prompt = rng.integers(3, VOCAB_SIZE, rng.integers(1, 20)).tolist()
        decoded = decode(base, weights, naive(template), prompt, max_tokens=25)
        samples.append(Sample(prompt, decoded.tokens))
        expected.append([len(step.tokens) for step in decoded.steps])
    ranks = answer_ranks(MaskModel.from_adapter(load(model), adapter), samples, 10**6)
    lengths = accepted_lengths(template, ranks)
    print(f"mean accepted length {np.concatenate(lengths).mean():.3f}")
    assert lengths == expected
    assert max(map(max, lengths)) >= min(template.max_depth + 1, 3), "no walk went far"


def test_replay_by_hand():
    """A chain of two; only M1's first candidate for token 2 and M1's and M2's for 5 and 6 are right."""
    ranks = np.full((9, 2), 3, dtype=np.int32)
    ranks[0, 0] = 0  # under token 0: token 2
    ranks[3, 0] = ranks[3, 1] = 0  # under token 3: tokens 5 and 6
    ranks[7:, 0] = ranks[6:, 1] = NO_RANK
    replay = TreeWalker(Template.from_widths([1, 1], 2)).replay(ranks)
    # 0 -> 1 (no candidates yet), 1 -> 2, 3 (token 2 drafted), 3 -> 4 (nothing), 4 -> 5, 6, 7, 7 -> 8
    assert replay.lengths == [1, 2, 1, 3, 1]
    assert replay.candidates == [(0, 0), (1, 3), (0, 3), (0, 0), (1, 0), (0, 3)]


def test_left_over_candidates_serve_where_a_node_has_no_group():
    """Root's M2 spoke about token 3; the step that starts at token 2 has no fresher word on it."""
    ranks = np.full((6, 2), 1, dtype=np.int32)
    ranks[0, 0] = ranks[0, 1] = 0
    walker = TreeWalker(Template.build([(0, 0)], {0: 2}))
    # 0 -> 1; 1 -> 2, 3 (stops at the node, left over: M2 of the group under 1, about 4); 3 -> 4; 4 -> 5
    replay = walker.replay(ranks)
    assert replay.lengths == [1, 2, 1, 1]
    assert replay.candidates == [(0, 0), (1, 1), (0, 1)]


def test_ranks_beside_all_logits(model, adapter):
    """Ranks and probabilities against sorting the logits of `mask_logits`, chunks and answer's end included."""
    rng = np.random.default_rng(1)
    sample = Sample(*(rng.integers(3, VOCAB_SIZE, n).tolist() for n in (5, 17)))
    mask_model = MaskModel.from_adapter(load(model), adapter)
    predictions = answer_predictions(mask_model, [sample], 10**6, chunk_groups=4)
    (ranks,), (probabilities,) = predictions.ranks, predictions.probabilities
    ids = sample.prompt_ids + sample.answer_ids
    with torch.no_grad():
        context = mask_model.context(torch.tensor([ids]))
        logits = mask_model.mask_logits(context, torch.arange(5, 22)[None])[0]  # [17, k, V]
    for i in range(17):
        for j in range(K):
            if i + 2 + j < 17:
                order = logits[i, j].argsort(descending=True, stable=True).tolist()
                assert ranks[i, j] == order.index(sample.answer_ids[i + 2 + j])
            else:
                assert ranks[i, j] == NO_RANK
    best = logits[:15].softmax(-1).sort(descending=True).values[..., :NUM_RANKS]
    np.testing.assert_allclose(probabilities[:15], best, rtol=1e-5)
    assert not probabilities[15:].any()


def test_max_positions_ends_before_the_sample_that_would_exceed_it(model, adapter):
    mask_model = MaskModel.from_adapter(load(model), adapter)
    samples = [Sample([3], [4] * n) for n in (10, 10, 10)]
    assert [len(r) for r in answer_ranks(mask_model, samples, 25)] == [10, 10]
    assert [len(r) for r in answer_ranks(mask_model, samples, 1)] == [10]


def test_mask_accuracy_by_hand():
    ranks = [np.array([[0, 4], [1, NO_RANK]]), np.array([[12, 0], [0, 0]])]
    accuracy = mask_accuracy(ranks)
    assert accuracy.num_positions.tolist() == [4, 3]
    assert accuracy.top[0].tolist() == [0.5] + [0.75] * 9
    np.testing.assert_allclose(accuracy.top[1], [2 / 3] * 4 + [1] * 6)


def test_acceptance_counts_the_candidates_of_the_reference_walk():
    """M1 under tokens 0, 2, 5 gives ranks 2, 0 and 12; the walk never asks the groups under the others."""
    ranks = np.full((8, 2), 4, dtype=np.int32)
    ranks[[0, 2, 5], 0] = [2, 0, 12]
    ranks[:, 1] = 3
    statistics = acceptance_statistics([ranks, ranks])
    # 0 -> 1; 1 -> 2 (M1, rank 2), 3 (M2 knew, but the tree has no child there); 3 -> 4, 5, 6; 6 -> 7
    assert statistics["reference_tree"] == "5,4"
    assert statistics["num_positions"] == [6, 4]
    third = round(1 / 3, 6)
    assert statistics["rank_probability"] == [
        [third, 0.0, third, *[0.0] * 7],
        [0.0, 0.0, 0.0, 1.0, *[0.0] * 6],
    ]


def test_acceptance_by_age_and_by_the_parents_rank():
    """M1 is always the second candidate, M2 the first where M1's group is under an even token."""
    ranks = np.full((41, 2), 1, dtype=np.int32)
    ranks[::2, 1] = 0
    ranks[-2:, 0] = ranks[-3:, 1] = NO_RANK
    counts = conditional_counts([ranks], [5, 4])
    # groups everywhere: 0 -> 1; then 1 -> 4, 4 -> 7, ... three tokens a step, M1 then M2 under lower ranks
    assert counts[0, 0, 0, 1] > 10
    assert counts[0, 0, 1].sum() == 0  # M2 never follows a top candidate ...
    assert counts[0, 1, 1, 0] > 5  # ... but lower ones: half of the groups are under even tokens
    assert counts[0, 1, 1, 1] > 5
    # a group under the root only is used up in one step: nothing is left of it
    assert counts[1].sum() == 0
    probability = acceptance_statistics([ranks])["conditional_rank_probability"]
    assert probability[0][0][0][1] > 0.95


def test_left_over_predictions_are_counted_by_age():
    """M1's token is the first candidate, M2's is not in the tree: each second step uses what is left of the root's."""
    ranks = np.zeros((40, 2), dtype=np.int32)
    ranks[:, 1] = 9
    counts = conditional_counts([ranks], [5, 4])
    assert counts[1, 0, 1, 9] > 5
    assert counts[1, :, 0].sum() == counts[1, 1].sum() == 0


def test_mask_that_was_never_reached_has_zeros():
    statistics = acceptance_statistics([np.full((20, 3), 50, dtype=np.int32)])
    assert statistics["rank_probability"] == [[0.0] * NUM_RANKS] * 3
    assert statistics["num_positions"][1:] == [0, 0]


def test_saved_statistics_choose_the_tree(adapter):
    probability = [[0.1] * 9 + [0.0], [0.05] * 10, [0.01] * 10]
    before = json.loads((adapter / "config.json").read_text())
    statistics = {"rank_probability": probability, "num_positions": [9, 9, 9]}
    save_acceptance(adapter, statistics)
    config = AdapterConfig.load(adapter)
    assert config.acceptance["rank_probability"] == probability
    assert {**config.raw, "acceptance": None} == {**before, "acceptance": None}
    chosen = parse_tree("auto:20", config, config.acceptance)
    assert chosen.first.num_rows <= 20
    assert chosen.describe() == best_template(20, K, statistics).describe()
    assert chosen.describe() != best_template(20, K).describe()


def test_tree_forms(adapter, tmp_path):
    config = AdapterConfig.load(adapter)
    assert parse_tree("3, 2", config, None).first.num_rows == 24
    assert parse_tree("auto", config, None).first.num_rows <= config.speculative_tokens + 1
    Template.build([(0, 0)], {0: 4}).save(tmp_path / "long.json")
    for spec, message in [
        ("5,4,3,2", "4 depths, but the adapter has 3"),
        ("auto:2", "row budget of 2 is too small"),
        ("auto:x", "neither 'auto', 'auto:ROWS'"),
        ("none.json", "neither 'auto', 'auto:ROWS'"),
        (str(tmp_path / "long.json"), "mask group of 4 rows, but the adapter has 3"),
    ]:
        with pytest.raises(TemplateError, match=message):
            parse_tree(spec, config, None)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def data(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.default_rng(2)
    samples = [
        Sample(*(rng.integers(3, VOCAB_SIZE, n).tolist() for n in (6, 20))) for _ in range(3)
    ]
    header = {"model": str(model), "revision": None, "settings": {}}
    SampleWriter(tmp_path / "data.jsonl", header).append(samples)
    return tmp_path / "data.jsonl"


def test_command_prints_saves_and_writes_the_same_figures(adapter, data, tmp_path, capsys):
    table = tmp_path / "eval.csv"
    argv = ["eval", str(adapter), "--data", str(data), "--tree", "2,1", "--tree", "auto:12"]
    assert cli.main([*argv, "--json", "--csv", str(table)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_answers"], result["num_answer_tokens"]) == (3, 60)
    assert [row["tree"] for row in result["trees"]] == ["2,1", "auto:12"]
    for row in result["trees"]:
        assert row["simulated"] == pytest.approx(57 / row["steps"])
    assert AdapterConfig.load(adapter).acceptance == result["acceptance"]
    rows = list(csv.DictReader(table.open()))
    assert [float(row["simulated"]) for row in rows] == [r["simulated"] for r in result["trees"]]
    assert rows[0]["git_sha"] and rows[0]["model"] and rows[0]["m3_top10"]
    assert cli.main([*argv, "--no-save"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{row['simulated']:.3f}" in shown for row in result["trees"])


def test_no_save_leaves_the_adapter_alone(adapter, data):
    before = (adapter / "config.json").read_bytes()
    assert cli.main(["eval", str(adapter), "--data", str(data), "--no-save"]) == 0
    assert (adapter / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "9,9,9,9"], "4 depths, but the adapter has 3"),
        (["--max-positions", "0"], "--max-positions is 0, but must be at least 1"),
        (["--data", "/no/such.jsonl"], "/no/such.jsonl cannot be read"),
        (["--model", "/no/such/model"], "could not be loaded"),
    ],
)
def test_bad_options_are_one_sentence(adapter, data, capsys, options, message):
    before = (adapter / "config.json").read_bytes()
    assert cli.main(["eval", str(adapter), "--data", str(data), *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bita: ") and message in error
    assert (adapter / "config.json").read_bytes() == before


def test_data_of_another_model_and_short_answers_are_refused(adapter, data, tmp_path, capsys):
    header = {"model": "other", "revision": None, "settings": {}}
    for name, sample, message in [
        ("strange", Sample([VOCAB_SIZE], [3, 3, 3, 3, 3, 3]), "made with another model ('other')"),
        ("short", Sample([3], [4, 4, 4, 4]), "too short for 3 mask tokens"),
    ]:
        SampleWriter(tmp_path / name, header).append([sample])
        assert cli.main(["eval", str(adapter), "--data", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err

"""The training loop: it learns, resumes exactly, loses nothing, and refuses with one sentence."""

import csv
import json
import os
import random
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.adapter.config import AdapterError
from bita_vllm.training import mask_attention, mask_flex
from bita_vllm.training.batches import IGNORED, BatchPlan, make_batch, usable_roots
from bita_vllm.training.configs import TrainConfig
from bita_vllm.training.initial import new_model
from bita_vllm.training.mask_lora import MaskLora
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.samples import Sample
from bita_vllm.training.trainer import Trainer, TrainingError, schedule

K = 3
CONFIG = TrainConfig(steps=6, batch_size=3, groups=8, warmup=2)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def samples(folder):
    """The tiny model's own greedy answers."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.randint(3, 500, (48, 8), generator=torch.Generator().manual_seed(0))
    output = base.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=40
    )
    return [
        Sample(row[:8].tolist(), row[8 : 48 - index % 5].tolist())
        for index, row in enumerate(output)
    ]


@pytest.fixture
def make_trainer(folder, samples, tmp_path):
    def make(config=CONFIG, rank=0, out=tmp_path / "out", data=samples):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = new_model(base, K, 4, 0, samples[0].answer_ids, "tiny")
        if rank:
            model.add_lora(MaskLora.for_model(base, rank))
        return Trainer(model, data, config, out, {"model": "tiny"})

    return make


def losses(trainer):
    return [row["loss"] for row in trainer.curve.rows]


def accuracy(model, samples):
    """Share of M1's best tokens that are the text's, over all roots."""
    batch = make_batch(samples, K, 1000, 1000, random.Random(0))
    with torch.no_grad():
        best = model.mask_logits(model.context(batch.input_ids), batch.roots).argmax(dim=-1)
    valid = batch.targets[..., 0] != IGNORED
    return float((best[..., 0] == batch.targets[..., 0])[valid].float().mean())


def schooled_model(seed=0):
    """A small Llama that has learned a language where each of 64 words has one successor."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    successor = torch.randperm(64)
    optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
    for _ in range(150):
        words = [torch.randint(64, (16,))]
        while len(words) < 24:
            words.append(successor[words[-1]])
        text = torch.stack(words, dim=1)
        optimizer.zero_grad()
        base(input_ids=text, labels=text).loss.backward()
        optimizer.step()
    return base.eval()


@pytest.mark.slow
def test_a_tiny_model_learns(tmp_path):
    """From a model's own greedy answers to drafts: what `bita train` is for, in seconds."""
    base = schooled_model()
    prompts = torch.arange(64)[:, None]
    texts = base.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=30
    ).tolist()
    samples = [Sample(text[:1], text[1:]) for text in texts]
    known, held_out = samples[:48], samples[48:]
    model = new_model(base, K, 4, 0, samples[0].answer_ids, "tiny")
    model.add_lora(MaskLora.for_model(base, 16))
    config = TrainConfig(steps=150, batch_size=8, groups=24, lora_lr=1e-2)
    before = accuracy(model, held_out)
    assert Trainer(model, known, config, tmp_path / "out").train()
    after = accuracy(model, held_out)
    print(f"\nM1's top-1 accuracy on held-out answers: {before:.3f} untrained, {after:.3f} trained")
    assert before < 0.1
    assert after > 0.6


@pytest.mark.parametrize("rank", [0, 4], ids=["plain", "lora"])
def test_resuming_gives_the_same_losses(make_trainer, tmp_path, rank):
    config = replace(CONFIG, ema=0.9)
    straight = make_trainer(config, rank, tmp_path / "straight")
    straight.train()
    first = make_trainer(config, rank, tmp_path / "halves")
    first.train(time_limit=0)
    assert first.step == 1
    second = make_trainer(config, rank, tmp_path / "halves")
    second.resume()
    assert second.train()
    assert losses(second) == losses(straight)
    for name in straight.parameters:
        torch.testing.assert_close(
            second.parameters[name], straight.parameters[name], rtol=0, atol=0
        )
        torch.testing.assert_close(second.average[name], straight.average[name], rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_stops(make_trainer, monkeypatch, number):
    trainer = make_trainer()
    loss = trainer.loss

    def interrupted(batch):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return loss(batch)

    monkeypatch.setattr(trainer, "loss", interrupted)
    assert not trainer.train()
    assert trainer.step == 3
    again = make_trainer()
    again.resume()
    assert again.step == 3


def test_a_crash_saves(make_trainer, monkeypatch):
    trainer = make_trainer()
    loss = trainer.loss

    def crashing(batch):
        if trainer.step == 2:
            raise RuntimeError("out of memory")
        return loss(batch)

    monkeypatch.setattr(trainer, "loss", crashing)
    with pytest.raises(RuntimeError):
        trainer.train()
    again = make_trainer()
    again.resume()
    assert again.step == 2


def test_divergence_keeps_what_was_saved(make_trainer):
    trainer = make_trainer()
    trainer.train(time_limit=0)
    saved = trainer.checkpoint_path.read_bytes()
    with torch.no_grad():
        trainer.model.mask_embeddings.fill_(float("inf"))
    with pytest.raises(TrainingError, match="The loss became nan at step 2"):
        trainer.train()
    assert trainer.checkpoint_path.read_bytes() == saved


def test_what_is_written(make_trainer, folder):
    trainer = make_trainer(rank=4)
    trainer.train()
    names = {path.name for path in trainer.out.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "mask_lora",
        "training_state.safetensors",
        "training.csv",
        "training.png",
    }
    with (trainer.out / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    training = json.loads((trainer.out / "config.json").read_text())["training"]
    assert training["steps_done"] == 6 and training["model"] == "tiny"
    assert training["arguments"]["lr"] == CONFIG.lr
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = MaskModel.from_adapter(base, trainer.out)
    for name, parameter in trainer.model.named_parameters():
        stored = parameter.bfloat16().float() if name.startswith("lora.") else parameter
        assert torch.equal(loaded.get_parameter(name), stored), name


def test_the_average_is_what_is_saved(make_trainer):
    trainer = make_trainer(replace(CONFIG, ema=0.5))
    start = trainer.model.mask_embeddings.detach().clone()
    trainer.train(time_limit=0)
    last = trainer.model.mask_embeddings.detach()
    saved = Adapter.load(trainer.out).mask_embeddings
    torch.testing.assert_close(saved, (start + last) / 2)
    assert not torch.equal(start, last)


@pytest.mark.parametrize(
    ("change", "rank", "message"),
    [
        ({"lr": 0.5}, 0, "lr was 0.03 and is now 0.5"),
        ({}, 4, "low-rank deltas was None and is now 'rank 4"),
    ],
    ids=["lr", "lora"],
)
def test_resuming_another_run_is_refused(make_trainer, change, rank, message):
    make_trainer().train(time_limit=0)
    with pytest.raises(AdapterError, match=message):
        make_trainer(replace(CONFIG, **change), rank).resume()


def test_resuming_nothing_is_refused(make_trainer):
    with pytest.raises(AdapterError, match="There is no training to resume"):
        make_trainer().resume()


def test_samples_without_room_for_a_group_are_refused(make_trainer):
    with pytest.raises(TrainingError, match="None of the 1 samples has an answer of three tokens"):
        make_trainer(data=[Sample([5, 6], [7])])


# --- Batches --------------------------------------------------------------------------------------


def test_groups_hang_in_the_answer_and_predict_what_follows():
    sample = Sample([10, 11, 12], [13, 14, 15, 16, 17])
    assert list(usable_roots(sample, 100)) == [2, 3, 4, 5]
    batch = make_batch([sample, Sample([10, 11, 12], [13, 14])], K, 9, 100, random.Random(0))
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 13, 14, 15, 16, 17],
        [10, 11, 12, 13, 14, 0, 0, 0],
    ]
    assert batch.roots[0].tolist() == [2, 3, 4, 5]
    none = IGNORED
    assert batch.targets[0].tolist() == [
        [14, 15, 16],
        [15, 16, 17],
        [16, 17, none],
        [17, none, none],
    ]
    assert batch.targets[1].tolist() == [[14, none, none], *[[none] * 3] * 3]


def test_long_texts_are_cut():
    sample = Sample([1] * 4, list(range(100)))
    batch = make_batch([sample], K, 500, 32, random.Random(0))
    assert batch.input_ids.shape == (1, 32)
    assert int(batch.roots.max()) == 29


@pytest.mark.parametrize("max_length, length", [(2048, 128), (100, 100)])
def test_padding_changes_shapes_and_not_the_loss(make_trainer, samples, max_length, length):
    trainer = make_trainer(rank=2)
    batches = [
        make_batch(samples[:3], K, 60, max_length, random.Random(0), padded)
        for padded in (False, True)
    ]
    assert batches[0].roots.shape[1] < 48 >= batches[0].input_ids.shape[1]
    assert batches[1].input_ids.shape == (3, length) and batches[1].roots.shape == (3, 60)
    plain, padded = (trainer.loss(batch) for batch in batches)
    assert padded.statistics[3].tolist() == plain.statistics[3].tolist()
    torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-5, atol=0)


def test_padded_batches_of_any_length_compile_attention_once(make_trainer, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled_attention = torch.compile(mask_flex.flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(mask_flex, "flex_attention", compiled_attention)
    monkeypatch.setattr(mask_attention, "use_flex", lambda query: True)
    model, counts = make_trainer().model, []
    for length in (30, 150, 210, 400):
        data = [Sample([5] * 4, [7] * (length - n)) for n in range(4)]
        batch = make_batch(data, K, 80, 2048, random.Random(0), padded=True)
        with torch.no_grad():
            model.mask_hidden(model.context(batch.input_ids), batch.roots)
        counts.append(len(compiled))
    assert counts[0] > 0 and len(set(counts)) == 1


def test_every_sample_comes_once_an_epoch_beside_others_of_its_length():
    lengths = random.Random(0).sample(range(1000), 40)
    plan = BatchPlan(lengths, 4, seed=1)
    for epoch in range(2):
        batches = [plan[epoch * 10 + step] for step in range(10)]
        assert sorted(index for batch in batches for index in batch) == list(range(40))
        spans = [max(b) - min(b) for b in ([lengths[i] for i in batch] for batch in batches)]
        assert sum(spans) <= 2000  # in random order: about 6000
    again = BatchPlan(lengths, 4, seed=1)
    assert again[13] == plan[13] and plan[13] != plan[3]


def test_schedule_warms_up_and_ends_near_zero():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] > 0.97
    assert all(a > b for a, b in pairwise(rates[9:])) and rates[-1] < 1e-3

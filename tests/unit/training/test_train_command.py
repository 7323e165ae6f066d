"""`bita train` from the command line: alone, in two processes, and with input it must refuse."""

import csv
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bita_vllm.cli import main
from bita_vllm.training.base_model import choose_device
from bita_vllm.training.train_command import parse_layers

RUN = ["--steps", "3", "--batch-size", "5", "--groups", "8", "--dtype", "float32"]
RUN += ["--prompt-tokens", "4", "--lora-rank", "2", "--device", "cpu"]


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.jsonl")


def write_data(path, vocab_size=500, answer=30):
    rng = random.Random(0)
    lines = [{"bita_data": 1, "model": "tiny", "revision": None, "settings": {}, "versions": {}}]
    for _ in range(12):
        prompt, text = (rng.choices(range(3, vocab_size), k=n) for n in (6, answer))
        lines.append({"prompt_ids": prompt, "answer_ids": text})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def losses(out):
    with (out / "training.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_trains_resumes_and_starts_from_an_adapter(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", str(model), "--data", str(data), *RUN]
    named = [*command, "--out", str(out), "--verifier", "somebody/tiny"]
    assert main([*named, "--time-limit", "0"]) == 0
    assert "stopped at step 1" in capsys.readouterr().out
    assert main([*command, "--out", str(out)]) == 1
    assert "holds a training run already" in capsys.readouterr().err
    assert main([*named, "--resume"]) == 0
    assert len(losses(out)) == 3
    text = (out / "config.json").read_text()
    assert str(model) not in text and str(tmp_path) not in text
    assert '"name_or_path": "somebody/tiny"' in text
    provenance = json.loads(text)["training"]
    assert provenance["data"][0]["model"] == "tiny"
    assert provenance["versions"]["torch"] == torch.__version__
    again = tmp_path / "again"
    assert main([*command, "--out", str(again), "--start-from", str(out), "--lr", "1e-9"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (out, again))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_deltas_grow_from_an_adapter_with_fewer(model, data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["train", str(model), "--data", str(data), *RUN]
    assert main([*command, "--out", str(first), "--lora-rank", "2"]) == 0
    grow = [*command, "--out", str(second), "--start-from", str(first), "--lora-rank"]
    assert main([*grow, "4"]) == 0
    config = json.loads((second / "mask_lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    origin = json.loads((second / "config.json").read_text())["training"]["started_from"]
    assert origin["adapter"] == "first" and origin["steps_done"] == 3
    capsys.readouterr()
    for options, message in (
        (["1"], "have rank 2, but rank 1 was asked for"),
        (["2", "--lora-targets", "q_proj"], "are of new ones: leave them out"),
    ):
        assert main([*grow, *options]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--checkpoint-activations", "--no-shard"])
def test_two_processes_give_one_processs_losses(model, data, tmp_path, how):
    """torchrun on two gloo processes, with FSDP2 and without; batches of five sequences: shares of 3 and 2."""
    command = ["train", str(model), "--data", str(data), *RUN, how]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "bita_vllm.cli"),
            *(*command, "--out", str(tmp_path / "two")),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    print(f"\none process {one}, two {two}")
    assert len(two) == 3
    assert two == pytest.approx(one, rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def missing_file(data):
    data.unlink()


def not_json(data):
    lines = data.read_text().splitlines()
    lines[4] = "{"
    data.write_text("\n".join(lines))


def empty(data):
    data.write_text("")


def other_vocabulary(data):
    write_data(data, vocab_size=4000)


def short_answers(data):
    write_data(data, answer=2)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (missing_file, [], "data.jsonl cannot be read"),
        (not_json, [], "data.jsonl line 5 is not JSON"),
        (empty, [], "data.jsonl"),
        (other_vocabulary, [], "but the model has 512 tokens"),
        (short_answers, ["--max-length", "6"], "has an answer of three tokens or more"),
        (None, ["--lora-targets", "qkv"], "no linear layer called qkv"),
        (None, ["--verifier", "x", "--start-from", "y"], "--start-from keeps the name"),
        (None, ["--lora-layers", "1-x"], "must be numbers and ranges such as 0-14,20"),
        (None, ["--distill", "1.5"], "--distill is 1.5, but must be between 0 and 1"),
        (None, ["--reach-power", "-1"], "--reach-power is -1.0, but must be at least 0"),
        (None, ["--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (None, ["--prompt-tokens", "300"], "num_prompt_tokens"),
        (None, ["--resume"], "There is no training to resume"),
        (None, ["--start-from", "nowhere"], "The adapter directory nowhere does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    model, data, tmp_path, capsys, damage, options, message
):
    if damage:
        damage(data)
    out = tmp_path / "out"
    assert main(["train", str(model), "--data", str(data), "--out", str(out), *RUN, *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("bita: ") == 1 and "Traceback" not in error
    assert not (out / "config.json").exists()


def test_a_model_that_is_not_there_is_refused(data, tmp_path, capsys):
    command = ["train", str(tmp_path / "none"), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "could not be loaded" in capsys.readouterr().err


def test_missing_matplotlib_is_named_before_training(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert main(["train", str(model), "--data", str(data), "--out", str(out), *RUN]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (out / "config.json").exists()


def test_out_of_memory_names_the_knobs(model, data, tmp_path, capsys, monkeypatch):
    def out_of_memory(self, *args):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("bita_vllm.training.mask_model.MaskModel.mask_hidden", out_of_memory)
    command = ["train", str(model), "--data", str(data), "--out", str(tmp_path / "out"), *RUN]
    assert main(command) == 1
    assert "lower --batch-size, --groups or --chunk-rows" in capsys.readouterr().err


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0-2,5,4-5") == [0, 1, 2, 4, 5]


def test_looking_for_a_gpu_leaves_cuda_alone(monkeypatch):
    """torch's own look forbids CUDA in forked children, of which vLLM's engine is one; NVML's does not."""
    looks = []
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(
        torch.cuda,
        "is_available",
        lambda: looks.append(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]) or True,
    )
    assert choose_device("auto") == "cuda"
    assert looks == ["1"]

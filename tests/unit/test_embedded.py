"""The embedded model: where it lies, that it is never half made, and that it is the real thing."""

import json
from pathlib import Path

import numpy as np
import pytest

from bita_vllm import embedded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITA_CACHE", str(tmp_path))
    return tmp_path


def fail(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_model_already_made_is_not_made_again(cache, monkeypatch):
    monkeypatch.setattr(embedded, "download_gguf", fail)
    made = cache / "bita" / "smollm2-135m-instruct"
    made.mkdir(parents=True)
    assert embedded.embedded_model_dir() == made


def test_the_cache_follows_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.delenv("BITA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "download_gguf", lambda folder: folder / "unused")
    monkeypatch.setattr(embedded, "convert", lambda gguf, out: (out / "config.json").touch())
    model = embedded.embedded_model_dir()
    assert model == tmp_path / "bita" / "smollm2-135m-instruct"
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(embedded, "download_gguf", lambda folder: folder / "unused")
    monkeypatch.setattr(embedded, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model_dir()
    assert list((cache / "bita").iterdir()) == []


def test_a_process_that_comes_second_takes_what_the_first_made(cache, monkeypatch):
    def convert_while_another_finishes(gguf: Path, out: Path) -> None:
        first = cache / "bita" / "smollm2-135m-instruct"
        first.mkdir()
        (first / "config.json").write_text("first")

    monkeypatch.setattr(embedded, "download_gguf", lambda folder: folder / "unused")
    monkeypatch.setattr(embedded, "convert", convert_while_another_finishes)
    assert (embedded.embedded_model_dir() / "config.json").read_text() == "first"


def test_a_wrong_checksum_is_an_error_with_both_sums(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not the model")
    with pytest.raises(embedded.EmbeddedModelError, match=f"{'0' * 64} was expected"):
        embedded.check_sha256(path, "0" * 64)


def test_rotary_pairs_become_halves():
    pairs = np.array([[0], [4], [1], [5], [10], [14], [11], [15]])  # two heads of x0 y0 x1 y1
    halves = embedded.split_rotary_halves(pairs, heads=2)
    assert halves.ravel().tolist() == [0, 1, 4, 5, 10, 11, 14, 15]


@pytest.mark.slow
def test_the_embedded_model_answers_a_question(embedded_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert json.loads((embedded_model / "config.json").read_text())["num_hidden_layers"] == 30
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(embedded.EmbeddedModelError, match="BITA_CACHE") as error:
        embedded.embedded_model_dir()
    assert "Not a directory" in str(error.value) and "\n" not in str(error.value)

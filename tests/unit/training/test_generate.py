"""Self-written prompts: where they start and end, which are kept; runs go on where they stopped."""

import json
import random
from copy import copy
from types import SimpleNamespace

import pytest

from bita_vllm import cli
from bita_vllm.training.configs import GenerateConfig
from bita_vllm.training.generate import MAX_BARREN_BATCHES, Generator
from bita_vllm.training.own_prompts import PromptFilter, UserTurn
from bita_vllm.training.samples import DataError, SampleWriter, chat_prompt_ids, read_samples

HEADER = {"model": "m", "revision": None, "settings": {}, "versions": {}}
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system\nBe kind.</s>\n"
    "{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WITH_BOS = "<pad>{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    from testbed.tiny_models import make_tokenizer

    tokenizer = make_tokenizer(935)
    tokenizer.chat_template = CHATML
    return tokenizer


def openings(tokenizer, opening: str) -> list[str]:
    return [tokenizer.decode(ids) for ids in UserTurn.of(tokenizer, opening).openings]


def test_user_turn_of_a_template_with_system_message(tokenizer):
    assert openings(tokenizer, "system") == ["<s>system\nBe kind.</s>\n<s>user\n"]
    assert openings(tokenizer, "bare") == ["<s>user\n"]  # <s>, which starts every text, only once
    assert openings(tokenizer, "mixed") == ["<s>system\nBe kind.</s>\n<s>user\n", "<s>user\n"]
    turn = UserTurn.of(tokenizer, "mixed")
    assert (turn.end_ids, turn.end_text) == ([tokenizer.eos_token_id], "")


def test_user_turn_that_ends_with_plain_text(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    turn = UserTurn.of(tokenizer, "mixed")
    assert openings(tokenizer, "mixed") == ["user: "]
    assert (turn.end_ids, turn.end_text) == ([], "\n")


def test_bare_opening_keeps_the_sequence_start(tokenizer):
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = WITH_BOS
    tokenizer.bos_token = "<pad>"
    assert openings(tokenizer, "bare") == ["<pad><s>user\n"]


def test_model_that_cannot_write_prompts_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"no chat template.*--prompts"):
        UserTurn.of(tokenizer, "mixed")
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="nothing in front of the user's first message"):
        UserTurn.of(tokenizer, "system")


def test_filter_keeps_what_is_whole_readable_and_new():
    prompts = PromptFilter(special_tokens=["<s>"])
    cases = [
        ("How do I bake bread at home?", True, "kept"),
        ("Explain why the sky is blue in the evening", False, "unfinished"),
        ("Hello there", True, "too short"),
        ("What does <s> mean in a template?", True, "unreadable"),
        ("What does \x07 mean in a terminal?", True, "unreadable"),
        ("What does \ufffd\ufffd mean in a file?", True, "unreadable"),
        ("Tell me about " + "cats and dogs and " * 40, True, "repetitive"),
        ("how do i bake bread, at home", True, "duplicate"),
        ("Please: how do I bake bread at home?", True, "duplicate"),
        ("How do I bake bread in a pan outside?", True, "kept"),
        ("\u5982\u4f55\u5728\u5bb6\u70e4\u9762\u5305\uff1f", True, "kept"),
    ]
    for text, finished, verdict in cases:
        before = prompts.counts[verdict]
        assert prompts.keep(text, finished) == (verdict == "kept"), text
        assert prompts.counts[verdict] == before + 1, (text, verdict, prompts.counts)
    assert str(prompts).startswith("3 of 11 prompts kept (3 unreadable, 2 duplicate")


class FakeLLM:
    """Writes prompts of random words from each request's seed; answers depend on the prompt alone."""

    def __init__(self, tokenizer, stop_after_batches: int | None = None) -> None:
        self.tokenizer, self.left = tokenizer, stop_after_batches

    def generate(self, prompts, params, use_tqdm):
        outputs = []
        if self.left is not None and params[0].temperature == 0:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        for prompt, p in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            rng = random.Random(str(p.seed) if p.temperature else str(ids))
            words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(rng.randint(2, 9))]
            text = " ".join(words)
            finished = rng.random() < 0.8
            tokens = self.tokenizer.encode(text)[: p.max_tokens]
            reason = "stop" if finished else "length"
            outputs.append(SimpleNamespace(text=text, token_ids=tokens, finish_reason=reason))
        return [SimpleNamespace(outputs=[output]) for output in outputs]


CONFIG = GenerateConfig(max_prompt_tokens=96, max_answer_tokens=20, batch_size=8)


def write(path, tokenizer, num_samples, stop_after_batches=None):
    generator = Generator(FakeLLM(tokenizer, stop_after_batches), tokenizer, CONFIG)
    generator.write_own(SampleWriter(path, HEADER), num_samples)
    return generator


def test_own_prompts_are_whole_samples(tmp_path, tokenizer):
    generator = write(tmp_path / "a.jsonl", tokenizer, 30)
    samples = read_samples(tmp_path / "a.jsonl")
    assert len(samples) == 30
    for sample in samples:
        assert sample.prompt_ids == chat_prompt_ids(tokenizer, sample.prompt)
        assert len(sample.prompt.split()) >= 3
        assert 4 <= len(sample.answer_ids) <= 20
    assert len({sample.prompt for sample in samples}) == 30
    assert generator.filter.counts["unfinished"] > 0


def test_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, tokenizer):
    write(tmp_path / "whole.jsonl", tokenizer, 40)
    for batches in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "parts.jsonl", tokenizer, 40, stop_after_batches=batches)
    assert 0 < len(read_samples(tmp_path / "parts.jsonl")) < 40
    write(tmp_path / "parts.jsonl", tokenizer, 40)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_more_samples_can_be_asked_for_later(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", tokenizer, 10)
    first = (tmp_path / "a.jsonl").read_bytes()
    write(tmp_path / "a.jsonl", tokenizer, 25)
    assert (tmp_path / "a.jsonl").read_bytes().startswith(first)
    assert len(read_samples(tmp_path / "a.jsonl")) == 25


def test_model_that_writes_nothing_usable_ends_the_run(tmp_path, tokenizer):
    class Silent(FakeLLM):
        calls = 0

        def generate(self, prompts, params, use_tqdm):
            self.calls += 1
            silence = SimpleNamespace(text="", token_ids=[1], finish_reason="stop")
            return [SimpleNamespace(outputs=[silence]) for _ in prompts]

    llm = Silent(tokenizer)
    with pytest.raises(DataError, match=r"no usable prompt in 5 batches .*40 too short"):
        Generator(llm, tokenizer, CONFIG).write_own(SampleWriter(tmp_path / "a", HEADER), 10)
    assert llm.calls == MAX_BARREN_BATCHES


def test_given_prompts_are_answered_once_each_and_long_ones_left_out(tmp_path, tokenizer):
    prompts = [f"Question number {i}?" for i in range(20)]
    given = [*prompts[:3], "long " * 100, prompts[1], *prompts[3:]]
    for left in (1, None):
        writer = SampleWriter(tmp_path / "a.jsonl", HEADER)
        generator = Generator(FakeLLM(tokenizer, left), tokenizer, CONFIG)
        try:
            generator.write_given(writer, given, len(given))
        except KeyboardInterrupt:
            assert left == 1
    assert [sample.prompt for sample in read_samples(tmp_path / "a.jsonl")] == prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "/no/such.jsonl"], "are not a file that exists"),
        (["--num-samples", "0"], "--num-samples is 0, but must be at least 1"),
        (["--temperature", "0"], "needs a temperature above 0"),
        (["--top-p", "1.5"], "top-p above 0 and at most 1"),
        (["--engine-args", "[1]"], "--engine-args is '[1]', which is no JSON object"),
    ],
)
def test_bad_options_are_one_sentence_before_any_engine_starts(
    tmp_path, tiny_model, capsys, monkeypatch, options, message
):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    out = tmp_path / "a.jsonl"
    assert cli.main(["data", str(tiny_model("llama")), "--out", str(out), *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bita: ") and message in error
    assert not out.exists()


def test_unknown_model_and_strange_file_are_one_sentence(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    assert cli.main(["data", str(tmp_path / "none"), "--out", str(tmp_path / "a")]) == 1
    assert "could not be loaded" in capsys.readouterr().err
    (tmp_path / "b").write_text(json.dumps({"prompt": "x"}))
    assert cli.main(["data", str(tiny_model("llama")), "--out", str(tmp_path / "b")]) == 1
    assert "is not a file of 'bita data'" in capsys.readouterr().err
    assert (tmp_path / "b").read_text() == '{"prompt": "x"}'

"""Data files keep every full line, prompts come in all usual shapes, and bad input is named by its line."""

import json
import sys
from types import SimpleNamespace

import pytest

from bita_vllm.training.samples import (
    DataError,
    Sample,
    SampleWriter,
    check_tokenizer,
    check_tokens,
    read_header,
    read_prompts,
    read_samples,
)

HEADER = {"model": "m", "revision": None, "settings": {"seed": 0}, "versions": {"vllm": "1"}}
SAMPLES = [Sample([1, 2], [3, 4, 5], "Hi?"), Sample([1, 6], [7, 8, 9, 10], "Who?")]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    SampleWriter(path, HEADER).append(SAMPLES)
    return path


def test_what_is_written_is_read_back(data_file):
    assert read_samples(data_file) == SAMPLES
    assert read_header(data_file) == {"bita_data": 1, **HEADER}


def test_writer_goes_on_behind_what_is_there(data_file):
    writer = SampleWriter(data_file, HEADER)
    assert writer.done == SAMPLES
    writer.append([Sample([5], [6], "More.")])
    assert read_samples(data_file) == [*SAMPLES, Sample([5], [6], "More.")]


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_partial_last_line_is_dropped_and_full_ones_stay(data_file, lost):
    whole = data_file.read_bytes()
    data_file.write_bytes(whole[:-lost])
    writer = SampleWriter(data_file, HEADER)
    assert writer.done == SAMPLES[:1]
    writer.append(SAMPLES[1:])
    assert data_file.read_bytes() == whole


def test_file_cut_inside_its_header_starts_afresh(data_file):
    data_file.write_bytes(data_file.read_bytes()[:30])
    assert SampleWriter(data_file, HEADER).done == []
    assert read_header(data_file) == {"bita_data": 1, **HEADER}


def test_another_vllm_version_may_go_on(data_file):
    assert SampleWriter(data_file, {**HEADER, "versions": {"vllm": "2"}}).done == SAMPLES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "model was 'm' and is now 'other'"),
        ({"settings": {"seed": 1}}, "seed was 0 and is now 1"),
        ({"settings": {"seed": 0, "top_p": 0.9}}, "top_p was None and is now 0.9"),
    ],
    ids=["model", "changed setting", "new setting"],
)
def test_run_with_other_settings_is_refused_and_the_file_left_alone(data_file, change, named):
    before = data_file.read_bytes()
    with pytest.raises(DataError, match="begun with other settings") as error:
        SampleWriter(data_file, {**HEADER, **change})
    assert named in str(error.value)
    assert data_file.read_bytes() == before


def test_writer_never_touches_a_strangers_file(tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("No newline at the end")
    with pytest.raises(DataError, match="is not a file of 'bita data'"):
        SampleWriter(path, HEADER)
    assert path.read_text() == "No newline at the end"


HEAD = json.dumps({"bita_data": 1, **HEADER})
GOOD = '{"prompt_ids": [1], "answer_ids": [2]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no samples"),
        (HEAD, "holds no samples"),
        (GOOD, "line 1 must be the header"),
        ("[1, 2]", "line 1 must be the header"),
        (f'{HEAD}\n{GOOD}\n{{"prompt_ids": [1', "line 3 is not JSON"),
        (f"{HEAD}\n\n{GOOD}\nnonsense", "line 4 is not JSON"),
        (f'{HEAD}\n{GOOD}\n{{"prompt_ids": [1]}}', "line 3 needs 'answer_ids'"),
        (f'{HEAD}\n{{"prompt_ids": [], "answer_ids": [2]}}', "line 2 needs 'prompt_ids'"),
        (f'{HEAD}\n{{"prompt_ids": [1.5], "answer_ids": [2]}}', "line 2 needs 'prompt_ids'"),
        (f'{HEAD}\n{{"prompt_ids": [1], "answer_ids": [-1]}}', "line 2 needs 'answer_ids'"),
        (f"{HEAD}\n7", "line 2 needs 'prompt_ids'"),
        (f"{HEAD}\n\x00\udcff", "line 2 is not JSON"),
    ],
)
def test_bad_data_file_is_named_by_its_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as error:
        read_samples(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read_samples(tmp_path / "gone.jsonl")


def test_data_of_another_model_is_refused(data_file):
    check_tokens(SAMPLES, 11, data_file)
    with pytest.raises(DataError, match="line 3 has token id 10, but the model has 10 tokens"):
        check_tokens(SAMPLES, 10, data_file)

    same = SimpleNamespace(chat_template=None, encode={"Hi?": [1, 2], "Who?": [1, 6]}.get)
    check_tokenizer(SAMPLES, same, data_file)
    other = SimpleNamespace(chat_template=None, encode={"Hi?": [1, 2], "Who?": [6]}.get)
    with pytest.raises(DataError, match=r"other token ids .* another model \('m'\)"):
        check_tokenizer(SAMPLES, other, data_file)


SHAPES = {
    "plain": ({"prompt": "Hi?"}, "Hi?"),
    "bare string": ("Hi?", "Hi?"),
    "MT-Bench": ({"question_id": 81, "turns": ["Hi?", "And then?"]}, "Hi?"),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Yes."},
            ]
        },
        "Hi?",
    ),
    "chat messages": (
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi?"}]},
        "Hi?",
    ),
    "Alpaca": ({"instruction": "Hi?", "input": "", "output": "x"}, "Hi?"),
    "Alpaca with input": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
}


@pytest.mark.parametrize(("row", "prompt"), SHAPES.values(), ids=SHAPES.keys())
def test_prompt_shapes(tmp_path, row, prompt):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    (tmp_path / "p.json").write_text(json.dumps([row, row], indent=1))
    assert read_prompts(str(tmp_path / "p.jsonl")) == [prompt, prompt]
    assert read_prompts(str(tmp_path / "p.json")) == [prompt, prompt]


def test_data_file_serves_as_prompts_for_another_model(data_file):
    assert read_prompts(str(data_file)) == ["Hi?", "Who?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b", "id": 1}', "line 2 has no prompt in a known"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}', "line 2 has no prompt in a known"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2 has no prompt in a known"),
        ("p.jsonl", '{"conversations": [{"from": "gpt", "value": "x"}]}', "line 1 has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.json", '[{"prompt": "a"}, {"question": "b"}]', "entry 2 has no prompt"),
        ("p.json", '[{"prompt": "a"}', "is not JSON"),
    ],
)
def test_bad_prompts_are_named_by_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read_prompts(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such.jsonl", "/no/such", "./no"])
def test_missing_prompt_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="are not a file that exists"):
        read_prompts(name)


def test_hub_dataset_with_split(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("owner/chats", "test")
        return [{"prompt": "Hi?"}, {"prompt": "Who?"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("owner/chats:test") == ["Hi?", "Who?"]


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as error:
        read_prompts("owner/chats")
    assert "could not be loaded as a Hugging Face dataset (ConnectionError: no route)" in str(
        error.value
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_prompts("owner/chats")

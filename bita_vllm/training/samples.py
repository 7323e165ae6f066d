"""Training data as JSON lines: what `bita data` writes, and prompts in the shapes that are about.

A data file starts with a provenance header, then has one sample a line, token ids as the model
sees them (chat template applied; the answer's end-of-turn token included):

    {"bita_data": 1, "model": ..., "revision": ..., "settings": {...}, "versions": {...}}
    {"prompt_ids": [1, 4093, ...], "answer_ids": [504, ...], "prompt": "What ..."}

Lines are appended and never changed, so a file that was cut off anywhere is still whole up to its
last full line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bita_vllm.system.errors import UserError

FORMAT_VERSION = 1
NUM_CHECKED_PROMPTS = 8
PROMPT_SHAPES = (
    '{"prompt": "..."}, {"turns": ["..."]}, ShareGPT {"conversations": [{"from": "human", "value": "..."}]}, '
    '{"messages": [{"role": "user", "content": "..."}]} or Alpaca {"instruction": "...", "input": "..."}'
)


class DataError(UserError):
    """Data that cannot be used; the message is one sentence that says where and what to do."""


@dataclass(frozen=True)
class Sample:
    """A prompt, chat template applied, and the model's own answer."""

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt: str = ""  # what the user says in it, for readers


# --- Data files -----------------------------------------------------------------------------------


def read_samples(path: str | Path) -> list[Sample]:
    """All samples of a data file. Raises DataError, with the line number."""
    samples = []
    for number, row in _json_lines(Path(path)):
        where = f"{path} line {number}"
        if number == 1:
            _check_header(row, where)
            continue
        samples.append(_sample(row, where))
    if not samples:
        raise DataError(f"{path} holds no samples; make some with 'bita data MODEL --out {path}'.")
    return samples


def read_header(path: str | Path) -> dict[str, Any]:
    """The provenance header of a data file. Raises DataError."""
    for _, row in _json_lines(Path(path)):
        _check_header(row, f"{path} line 1")
        return row
    raise DataError(f"{path} is empty; a data file starts with a header, as 'bita data' writes it.")


def check_tokens(samples: Sequence[Sample], vocab_size: int, path: str | Path) -> None:
    """Raise DataError if the samples of `path` have tokens that a model does not have."""
    for number, sample in enumerate(samples, start=2):
        largest = max(sample.prompt_ids + sample.answer_ids)
        if largest >= vocab_size:
            raise DataError(
                f"{path} line {number} has token id {largest}, but the model has {vocab_size} tokens: "
                f"{_made_with(path)}; make it again with this one."
            )


def check_tokenizer(samples: Sequence[Sample], tokenizer: Any, path: str | Path) -> None:
    """Raise DataError if a model's tokenizer and chat template make other prompts of the same text."""
    with_text = [sample for sample in samples if sample.prompt][:NUM_CHECKED_PROMPTS]
    if any(chat_prompt_ids(tokenizer, s.prompt) != s.prompt_ids for s in with_text):
        raise DataError(
            f"The prompts in {path} have other token ids with this model's tokenizer and chat template: "
            f"{_made_with(path)}; make it again with this one."
        )


def _made_with(path: str | Path) -> str:
    return f"the data was made with another model ({read_header(path).get('model')!r})"


def chat_prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message, ready to be answered; as plain text without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer.encode(text)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


class SampleWriter:
    """Appends samples to a data file that is new or was begun with the same model and settings."""

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """`done` then holds the samples that are there already.

        Raises DataError if the file is no data file or was begun otherwise; it is left as it is.
        """
        self.path = Path(path)
        self.done: list[Sample] = []
        try:
            if self._drop_partial_line():
                _check_same_run(read_header(path), header, path)
                if sum(1 for _ in _json_lines(self.path)) > 1:
                    self.done = read_samples(path)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._append([{"bita_data": FORMAT_VERSION, **header}])
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}).") from error

    def append(self, samples: Iterable[Sample]) -> None:
        """Write one batch, and wait until the disk has it. Raises DataError."""
        try:
            self._append([vars(sample) for sample in samples])
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}); all samples before this batch are kept."
            ) from error

    def _append(self, rows: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = memoryview(lines.encode())
                while written:
                    written = written[file.write(written) :]
                os.fsync(file.fileno())
            except (
                BaseException
            ):  # the disk is full, or somebody wants us to end: no part of a line stays
                os.ftruncate(file.fileno(), end)
                raise

    def _drop_partial_line(self) -> bool:
        """Cut off what an interrupted write left after the last full line; False if nothing is left.

        A first line that is not ours is never cut: the file may be somebody's only copy.
        """
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if content and not content.startswith(b'{"bita_data"'):
            raise DataError(
                f"{self.path} exists and is not a file of 'bita data'; give --out another name."
            )
        if end < len(content):
            os.truncate(self.path, end)
        return end > 0


def _check_header(row: Any, where: str) -> None:
    if not isinstance(row, dict) or row.get("bita_data") != FORMAT_VERSION:
        raise DataError(
            f"{where} must be the header {{\"bita_data\": {FORMAT_VERSION}, ...}} of a file made by 'bita data'; "
            "prompts of other shapes go through 'bita data MODEL --prompts FILE' first."
        )


def _check_same_run(old: dict[str, Any], new: dict[str, Any], path: str | Path) -> None:
    """Versions may differ: what decides the samples is the model and the settings."""
    before = {"model": old.get("model"), "revision": old.get("revision"), **old.get("settings", {})}
    now = {"model": new["model"], "revision": new["revision"], **new["settings"]}
    different = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise DataError(
            f"{path} was begun with other settings ({'; '.join(different)}); go on with the same ones, "
            "or give --out another name."
        )


def _sample(row: Any, where: str) -> Sample:
    for key in ("prompt_ids", "answer_ids"):
        ids = row.get(key) if isinstance(row, dict) else None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(
                f"{where} needs {key!r}, a list of token ids that is not empty; make the file with 'bita data'."
            )
    return Sample(row["prompt_ids"], row["answer_ids"], str(row.get("prompt", "")))


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, content) of every line that is not blank. Raises DataError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        reason = getattr(error, "msg", None) or getattr(error, "reason", error)
                        raise DataError(
                            f"{path} line {number} is not JSON ({reason}); repair or remove that line."
                        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error


# --- Prompts --------------------------------------------------------------------------------------


def read_prompts(source: str) -> list[str]:
    """The user's first message of each entry of a JSONL or JSON file, or of a Hugging Face dataset.

    `source` is a path, or a dataset's name, maybe with a split: `owner/name:split` (default train).
    A data file of another model will do as well. Raises DataError: unknown shape (with the line),
    nothing there, no hub.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows: Iterable[tuple[str, Any]] = _file_rows(path)
    elif source.startswith(("/", ".", "~")) or path.suffix in (".json", ".jsonl") or path.exists():
        raise DataError(f"The prompts {source} are not a file that exists.")
    else:
        rows = _hub_rows(source)
    prompts = [prompt_text(row, where) for where, row in rows]
    if not prompts:
        raise DataError(f"{source} holds no prompts; expected one a line, as in {PROMPT_SHAPES}.")
    return prompts


def prompt_text(row: Any, where: str) -> str:
    """The first message of the user in one entry. Raises DataError for a shape nobody knows."""
    text = None
    match row:
        case str():
            text = row
        case {"prompt": str(prompt)}:
            text = prompt
        case {"turns": [str(first), *_]}:
            text = first
        case {"instruction": str(instruction)}:
            text = "\n\n".join(part for part in (instruction, row.get("input")) if part)
        case {"conversations": list(turns)}:
            text = _first_of_user(turns, "from", ("human", "user"), "value")
        case {"messages": list(turns)}:
            text = _first_of_user(turns, "role", ("user",), "content")
    if not isinstance(text, str) or not text.strip():
        shape = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where} has no prompt in a known shape ({shape}); expected {PROMPT_SHAPES}."
        )
    return text


def _first_of_user(turns: list[Any], role: str, names: tuple[str, ...], content: str) -> Any:
    for turn in turns:
        if isinstance(turn, dict) and turn.get(role) in names:
            return turn.get(content)
    return None


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
    if not is_array:
        for number, row in _json_lines(path):
            if not (number == 1 and isinstance(row, dict) and "bita_data" in row):
                yield f"{path} line {number}", row
        return
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); repair it.") from None
    yield from ((f"{path} entry {number}", row) for number, row in enumerate(rows, start=1))


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise DataError(
            f"The prompts {source} are no file; to read them as a Hugging Face dataset, pip install datasets."
        ) from None
    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client, its HTTP stack and the cache each raise their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"The prompts {source} are no file and could not be loaded as a Hugging Face dataset "
            f"({type(error).__name__}: {reason})."
        ) from error
    yield from ((f"{source} row {number}", row) for number, row in enumerate(dataset, start=1))

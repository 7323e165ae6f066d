"""Prompts that the model writes itself: how its chat template opens a user's turn, and which are kept.

A chat model continues the bare opening of a user's turn with what a user might say (the idea of
Magpie, arXiv 2406.08464). No data set, no licence: the prompts are the model's own.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bita_vllm.training.samples import DataError

OPENINGS = ("system", "bare", "mixed")
MIN_WORDS = 3
MAX_COMPRESSION = 2.5  # raw bytes to zlib's: prose has about 1.5 to 2, a loop has much more
SHINGLE_WORDS = 4
MAX_SEEN_SHARE = 0.5  # of a prompt's shingles
_CJK = (
    "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each sign counts as a word
)
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")
_MARKS = ("\ue000", "\ue001", "\ue002")  # stand for the messages' contents in a rendered template


@dataclass(frozen=True)
class UserTurn:
    """Where a chat template lets a user speak.

    Attributes:
        openings: token ids up to where the user's first message starts; more than one if they vary.
        end_ids: tokens that end the message, in addition to the model's own end of sequence.
        end_text: text that ends it, where no special token does; empty otherwise.
    """

    openings: list[list[int]]
    end_ids: list[int]
    end_text: str

    @classmethod
    def of(cls, tokenizer: Any, opening: str) -> UserTurn:
        """Read it from the tokenizer's chat template.

        `opening` is 'system' (all that the template puts in front, such as its default system
        message), 'bare' (the user's header alone) or 'mixed' (both in turn).
        Raises DataError if the model has no chat template or one without a user's turn.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                "The model has no chat template, so it cannot write prompts of its own; give some with --prompts."
            )
        first, answer, second = _MARKS
        one = [{"role": "user", "content": first}]
        two = [*one, {"role": "assistant", "content": answer}]
        three = [*two, {"role": "user", "content": second}]
        before, _, after = _render(tokenizer, one).partition(first)
        ending = _render(tokenizer, two).partition(answer)[2]
        again = _render(tokenizer, three).partition(answer)[2].removeprefix(ending)
        header = again.partition(second)[0]
        bos = tokenizer.bos_token or ""
        if bos and before.startswith(bos) and not header.startswith(bos):
            header = bos + header
        texts = {"system": [before], "bare": [header], "mixed": [before, header]}[opening]
        openings = []
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in openings:
                openings.append(ids)
        if not openings:
            raise DataError(
                "The model's chat template puts nothing in front of the user's first message, so the model cannot "
                "be made to write one; give prompts with --prompts."
            )
        end = tokenizer.encode(after, add_special_tokens=False)
        if end and end[0] in tokenizer.all_special_ids:
            return cls(openings, [end[0]], "")
        return cls(openings, [], after.strip() or after)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


class PromptFilter:
    """Keeps prompts that are whole, readable and new; counts what became of each."""

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        """Text that holds one of `special_tokens` is refused as unreadable."""
        self._special_tokens = tuple(special_tokens)
        self.counts: Counter[str] = Counter()
        self._seen_prompts: set[tuple[str, ...]] = set()
        self._seen_shingles: set[tuple[str, ...]] = set()

    def keep(self, text: str, finished: bool) -> bool:
        """Whether to keep a prompt; `finished` says that the model ended the turn itself."""
        verdict = self._fault(text) if finished else "unfinished"
        self.counts[verdict or "kept"] += 1
        return not verdict

    def remember(self, text: str) -> None:
        """Count prompts like this one as known."""
        words = normal_words(text)
        self._seen_prompts.add(words)
        self._seen_shingles |= shingles(words)

    def _fault(self, text: str) -> str:
        if not all(c.isprintable() or c in "\n\t" for c in text) or "\ufffd" in text:
            return "unreadable"
        if any(token in text for token in self._special_tokens):
            return "unreadable"
        words = normal_words(text)
        if len(words) < MIN_WORDS:
            return "too short"
        raw = text.encode()
        if len(raw) > MAX_COMPRESSION * len(zlib.compress(raw)):
            return "repetitive"
        pieces = shingles(words)
        seen = len(pieces & self._seen_shingles)
        if words in self._seen_prompts or (pieces and seen > MAX_SEEN_SHARE * len(pieces)):
            return "duplicate"
        self.remember(text)
        return ""

    def __str__(self) -> str:
        total = self.counts.total()
        kept = self.counts["kept"]
        dropped = ", ".join(f"{n} {why}" for why, n in self.counts.most_common() if why != "kept")
        return f"{kept} of {total} prompts kept" + (f" ({dropped})" if dropped else "")


def normal_words(text: str) -> tuple[str, ...]:
    """Words without case and punctuation."""
    return tuple(_WORD.findall(text.casefold()))


def shingles(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """All runs of SHINGLE_WORDS words; empty for fewer words."""
    return {words[i : i + SHINGLE_WORDS] for i in range(len(words) - SHINGLE_WORDS + 1)}

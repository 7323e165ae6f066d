"""Answers to the model's own prompts: the share of the adapter's acceptance that this model reaches here.

`bita eval` counts accepted drafts in its own texts, from answers that exist already. A served request gets less: its
first block has no candidates, drafts at an answer's beginning are right less often, and the model may be rounded,
quantised or tuned otherwise. So the model writes a few prompts and answers them, as it would be served.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from bita_vllm.scheduling.online import LENGTH_DEVIATION, SURE
from bita_vllm.training.configs import GenerateConfig
from bita_vllm.training.generate import Generator
from bita_vllm.training.own_prompts import UserTurn
from bita_vllm.training.samples import DataError
from bita_vllm.tree.ladder import PLAIN_WIDTH
from bita_vllm.tree.search import evaluate, scaled
from bita_vllm.tree.template_set import TemplateSet
from bita_vllm.tuning.profile import every_schedule, scheduler_of, set_width

NUM_ANSWERS = 12
PROMPT_TOKENS, ANSWER_TOKENS = 96, 192  # at most
MOST_ATTEMPTS = 3  # to have enough prompts, a batch each
FEWEST_STEPS = 100  # fewer say nothing
TOLERANCE = 1e-4  # of the factor that is looked for


class Answers(NamedTuple):
    """Tokens and steps of the answers.

    Attributes:
        rows: of a block.
        tokens: of all answers, without the first of each, which its prefill gives.
        steps: of all answers.
    """

    rows: int
    tokens: int
    steps: int

    @property
    def accepted_length(self) -> float:
        """Tokens a step."""
        return self.tokens / self.steps

    @property
    def spread(self) -> float:
        """How far the accepted length may be off, relative to it: two standard errors."""
        return float(SURE * LENGTH_DEVIATION / np.sqrt(self.steps))


def longest_answer(num_rows: int) -> int:
    """Tokens that a request of `serve_answers` may come to, with blocks of so many rows."""
    return PROMPT_TOKENS + ANSWER_TOKENS + num_rows


def serve_answers(llm: Any, rows: int) -> Answers | None:
    """Answers to prompts of the model's own, with blocks of so many rows.

    None, and a sentence on stderr, for a model that writes no prompts, or answers of next to nothing.
    """
    generator = Generator(
        llm,
        llm.get_tokenizer(),
        GenerateConfig(max_prompt_tokens=PROMPT_TOKENS, max_answer_tokens=ANSWER_TOKENS),
    )
    try:
        turn = UserTurn.of(generator.tokenizer, generator.config.opening)
    except DataError as error:
        _say_nothing_seen(str(error).split(", so ")[0].rstrip("."))
        return None
    set_width(scheduler_of(llm), PLAIN_WIDTH)
    prompts: list[tuple[str, list[int]]] = []
    for attempt in range(MOST_ATTEMPTS):
        if missing := NUM_ANSWERS - len(prompts):
            prompts += generator.own_prompts(turn, len(prompts), attempt, missing)[:missing]
    set_width(scheduler_of(llm), rows - 1)
    steps = 0

    def count(output: Any) -> None:
        nonlocal steps
        steps += sum(n > 0 for n in output.scheduled_cached_reqs.num_output_tokens)

    with every_schedule(scheduler_of(llm), count):
        samples = generator.answers(prompts)
    answers = Answers(rows, sum(len(one.answer_ids) - 1 for one in samples), steps)
    if answers.steps < FEWEST_STEPS:
        _say_nothing_seen(f"The model's own prompts gave {answers.steps} steps of answers")
        return None
    return answers


def _say_nothing_seen(why: str) -> None:
    print(
        f"{why}: what drafts bring is taken from the adapter's statistics alone.", file=sys.stderr
    )


def acceptance_reached(
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
    templates: TemplateSet,
    accepted_length: float,
) -> float:
    """The factor on all acceptance with which blocks of the set are expected to reach that accepted length.

    It is at most what leaves every mask's probabilities a sum of 1. The length grows with it, so bisection finds it.
    """
    shapes = [templates.first.shape]
    low, high = 0.0, 1.0 / float(acceptance.sum(axis=-1).max())
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        length = evaluate(shapes, scaled(acceptance, middle)).accepted_length[0] * templates.gain
        too_long = length > accepted_length
        low, high = (low, middle) if too_long else (middle, high)
    return (low + high) / 2

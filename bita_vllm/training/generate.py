"""Samples from the model itself: its own prompts or given ones, and its greedy answers.

Batch by batch through vLLM's offline engine. Every batch is on the disk before the next one starts,
and random seeds follow from how many samples are written, so an interrupted run goes on as if it
had not been.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bita_vllm.training.configs import GenerateConfig
from bita_vllm.training.own_prompts import PromptFilter, UserTurn
from bita_vllm.training.samples import DataError, Sample, SampleWriter, chat_prompt_ids

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams

MAX_BARREN_BATCHES = 5
MIN_ANSWER_TOKENS = 4  # fewer leave no place for a mask row


class Generator:
    """Makes samples with a vLLM engine and its tokenizer."""

    def __init__(self, llm: LLM, tokenizer: Any, config: GenerateConfig) -> None:
        self.llm, self.tokenizer, self.config = llm, tokenizer, config
        self.filter = PromptFilter(tokenizer.all_special_tokens)

    def write_own(self, writer: SampleWriter, num_samples: int) -> None:
        """Append samples of self-written prompts until the file holds `num_samples`.

        Raises DataError if the model writes no usable prompt in several batches.
        """
        turn = UserTurn.of(self.tokenizer, self.config.opening)
        for sample in writer.done:
            self.filter.remember(sample.prompt)
        written, barren = len(writer.done), 0
        with _progress(written, num_samples) as bar:
            while written < num_samples:
                prompts = self.own_prompts(turn, written, barren, num_samples - written)
                samples = self.answers(prompts)[: num_samples - written]
                bar.set_postfix_str(str(self.filter))
                barren = 0 if samples else barren + 1
                if barren == MAX_BARREN_BATCHES:
                    raise DataError(
                        f"The model wrote no usable prompt in {barren} batches ({self.filter}); try another "
                        "--temperature or --opening, or give prompts with --prompts."
                    )
                writer.append(samples)
                written += len(samples)
                bar.update(len(samples))

    def write_given(self, writer: SampleWriter, prompts: Sequence[str], num_samples: int) -> None:
        """Append the answers to the first prompts that fit, until the file holds `num_samples`."""
        known = {tuple(sample.prompt_ids) for sample in writer.done}
        waiting = self._given_prompts(prompts, known)
        written = len(writer.done)
        with _progress(written, num_samples) as bar:
            while written < num_samples:
                size = min(self.config.batch_size, num_samples - written)
                batch = list(islice(waiting, size))
                if not batch:
                    break
                samples = self.answers(batch)
                writer.append(samples)
                written += len(samples)
                bar.update(len(samples))

    def own_prompts(
        self, turn: UserTurn, written: int, attempt: int, missing: int
    ) -> list[tuple[str, list[int]]]:
        """A batch of new prompts that passed the filter: (text, ids with chat template)."""
        from vllm import SamplingParams

        config = self.config
        rng = random.Random(f"{config.seed}/{written}/{attempt}")
        num = min(config.batch_size, 2 * missing)
        params = [
            SamplingParams(
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_prompt_tokens,
                seed=rng.getrandbits(31),
                stop_token_ids=turn.end_ids,
                stop=turn.end_text or None,
                skip_special_tokens=False,
            )
            for _ in range(num)
        ]
        openings = [turn.openings[(written + i) % len(turn.openings)] for i in range(num)]
        kept = []
        for output in self._run(openings, params):
            text = output.text.strip()
            if self.filter.keep(text, finished=output.finish_reason == "stop"):
                ids = chat_prompt_ids(self.tokenizer, text)
                if len(ids) <= config.max_prompt_tokens:
                    kept.append((text, ids))
        return kept

    def _given_prompts(
        self, prompts: Sequence[str], known: set[tuple[int, ...]]
    ) -> Iterator[tuple[str, list[int]]]:
        for text in prompts:
            ids = chat_prompt_ids(self.tokenizer, text)
            if len(ids) <= self.config.max_prompt_tokens and tuple(ids) not in known:
                known.add(tuple(ids))
                yield text, ids

    def answers(self, prompts: Sequence[tuple[str, list[int]]]) -> list[Sample]:
        """The model's greedy answers, without those too short to be of use."""
        from vllm import SamplingParams

        if not prompts:
            return []
        greedy = SamplingParams(
            temperature=0.0, max_tokens=self.config.max_answer_tokens, detokenize=False
        )
        outputs = self._run([ids for _, ids in prompts], [greedy] * len(prompts))
        return [
            Sample(ids, list(output.token_ids), text)
            for (text, ids), output in zip(prompts, outputs, strict=True)
            if len(output.token_ids) >= MIN_ANSWER_TOKENS
        ]

    def _run(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[CompletionOutput]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            list(params),
            use_tqdm=partial(tqdm, leave=False, position=1),
        )
        return [output.outputs[0] for output in outputs]


def _progress(written: int, num_samples: int) -> tqdm:
    return tqdm(total=num_samples, initial=written, desc="samples", unit="sample")

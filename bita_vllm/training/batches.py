"""From samples to batches: sequences of like length together, mask groups at random places.

Everything is a function of (seed, step), so a run that resumes at a step goes on as if it had
never stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

IGNORED = -100  # a target that is past the text's end
LENGTH_STEP = 128  # tokens that a padded batch grows by


class TokenSample(Protocol):
    """A prompt and the answer to it, as token ids (bita_vllm.training.samples.Sample)."""

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def answer_ids(self) -> list[int]: ...


@dataclass(frozen=True)
class MaskBatch:
    """Sequences and the mask groups that hang in them."""

    input_ids: torch.Tensor  # [B, T] int64, right-padded with 0
    roots: torch.Tensor  # [B, G] int64 positions; 0 for a group that is not there
    targets: torch.Tensor  # [B, G, k] int64: token at root + 1 + j for j = 1..k, or IGNORED


def usable_roots(sample: TokenSample, max_length: int) -> range:
    """Positions of the sample that can be a root: from the prompt's last token to the last one
    that M1 has a target for, within the first `max_length` tokens."""
    length = min(len(sample.prompt_ids) + len(sample.answer_ids), max_length)
    return range(max(0, len(sample.prompt_ids) - 1), length - 2)


def make_batch(
    samples: Sequence[TokenSample],
    num_masks: int,
    num_groups: int,
    max_length: int,
    rng: random.Random,
    padded: bool = False,
) -> MaskBatch:
    """Right-padded sequences with up to `num_groups` roots each, drawn without repeats.

    `padded`: in shapes that are few, as compiled attention wants them: T in steps, G as asked for.
    """
    texts = [[*sample.prompt_ids, *sample.answer_ids][:max_length] for sample in samples]
    drawn = []
    for sample in samples:
        usable = usable_roots(sample, max_length)
        drawn.append(sorted(rng.sample(usable, min(num_groups, len(usable)))))
    width, length = max(map(len, drawn)), max(map(len, texts))
    if padded:
        length = min(max_length, math.ceil(length / LENGTH_STEP) * LENGTH_STEP)
        width = min(num_groups, length)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    roots = torch.zeros(len(texts), width, dtype=torch.long)
    targets = torch.full((len(texts), width, num_masks), IGNORED)
    for row, (text, places) in enumerate(zip(texts, drawn, strict=True)):
        tokens = torch.tensor(text)
        input_ids[row, : len(text)] = tokens
        at = torch.tensor(places, dtype=torch.long)
        roots[row, : len(places)] = at
        wanted = at[:, None] + 2 + torch.arange(num_masks)  # [groups, k]
        exists = wanted < len(text)
        targets[row, : len(places)] = torch.where(
            exists, tokens[wanted.clamp(max=len(text) - 1)], IGNORED
        )
    return MaskBatch(input_ids, roots, targets)


class BatchPlan:
    """Which samples each step takes: sorted by length, cut into batches, shuffled every epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = min(batch_size, len(lengths))
        self._seed = seed
        self.steps_per_epoch = len(lengths) // self._batch_size
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        """Indices of the samples of `step`. The samples left over differ from epoch to epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = random.Random(f"{self._seed}/{epoch}")
            kept = rng.sample(range(len(self._lengths)), self.steps_per_epoch * self._batch_size)
            # Not quite by length: else the same samples would always meet.
            kept.sort(key=lambda index: self._lengths[index] * rng.uniform(0.9, 1.1))
            size = self._batch_size
            self._batches = [kept[i : i + size] for i in range(0, len(kept), size)]
            rng.shuffle(self._batches)
            self._epoch = epoch
        return self._batches[place]

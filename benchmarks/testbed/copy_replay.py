"""Decoding with masks and copies in one block, replayed on known answers in the steps that the engine takes.

A block is a mask-drafted tree and a chain of copies that hangs from the same root. The walk follows every node whose
path holds the target's tokens, so a step's accepted length is that of the tree or that of the chain, whichever is
longer. A walk that ends on a copy goes on with what is left of the predictions of the mask groups above, or with those
of a group under the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from bita_kernels import cpu_kernels
from bita_kernels.copy_rules import MAX_COPIES

from bita_vllm.step.copies import MAX_PLACES
from bita_vllm.step.copy_chance import CopyChance
from bita_vllm.tree import Template
from bita_vllm.tree.markov import promise_weight, state_values
from bita_vllm.tree.replay import Sources, TreeWalker
from bita_vllm.tree.shape import TreeBatch, TreeShape


@dataclass(frozen=True)
class Copies:
    """What the source says at each place of an answer of n tokens: the text ends with that token.

    Attributes:
        length: `[n]` tokens of the longest match, 0 without one.
        taken: `[n]` copied tokens that the answer goes on with, until it differs or ends.
        known: `[n]` copied tokens that the answer is long enough to judge.
    """

    length: np.ndarray
    taken: np.ndarray
    known: np.ndarray

    @classmethod
    def of(
        cls, prompt_ids: Sequence[int], answer_ids: Sequence[int], max_places: int = MAX_PLACES
    ) -> Copies:
        """Found by the kernel, token by token."""
        assert cpu_kernels.register()
        text = torch.tensor([*prompt_ids, *answer_ids], dtype=torch.int32)[None]
        size, first, n = text.shape[1], len(prompt_ids), len(answer_ids)
        head = torch.empty(1, 2, 4096, dtype=torch.int32)
        previous, state = torch.empty_like(text), torch.zeros(1, 4, dtype=torch.int32)
        copies, length = torch.zeros(n, MAX_COPIES, dtype=torch.int64), torch.zeros(n, 1).long()
        outcome, slot = torch.empty(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        for i in range(n):
            torch.ops.bita.find_copies_cpu(
                text, torch.tensor([first + i + 1]), slot, max_places, head, previous, state,
                copies[i : i + 1], length[i], outcome,
            )  # fmt: skip
        places = first + 1 + np.arange(n)[:, None] + np.arange(MAX_COPIES)
        following = text[0].numpy()[np.minimum(places, size - 1)]
        same = (copies.numpy() == following) & (places < size) & (length.numpy() > 0)
        known = np.minimum(n - 1 - np.arange(n), MAX_COPIES)
        return cls(length[:, 0].numpy(), np.cumprod(same, axis=1).sum(axis=1), known)


@dataclass(frozen=True)
class MixedBlock:
    """A tree of masks and a chain of copies.

    Attributes:
        template: the mask-drafted tree; None: the root alone.
        copies: length of the chain.
        groups: copy, from 1 -> length of the mask group under it.
    """

    template: Template | None
    copies: int = 0
    groups: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        rows = 1 if self.template is None else self.template.num_rows
        return rows + self.copies + sum(self.groups.values())


# (place in the answer, sources of the masks' candidates, chances of the copies) -> which block
Choice = Callable[[int, Sources, np.ndarray], int]


class MixedWalker:
    """Replays answers with some blocks, of which each step takes one."""

    def __init__(self, blocks: Sequence[MixedBlock]) -> None:
        self.blocks = blocks
        templates = [block.template for block in blocks if block.template is not None]
        self.walker = TreeWalker(*templates) if templates else None
        places = np.cumsum([block.template is not None for block in blocks]) - 1
        self.template_of = [
            None if block.template is None else int(place)
            for block, place in zip(blocks, places, strict=True)
        ]

    def replay(
        self,
        # [n, k]
        ranks: np.ndarray,
        copies: Copies,
        chance: CopyChance,
        choose: Choice = lambda *_: 0,
    ) -> list[int]:
        """Accepted length of every step after prefill."""
        by_place, last = ranks.tolist(), len(ranks) - 1
        taken, length = copies.taken.tolist(), copies.length
        slot = np.zeros(1, dtype=np.int64)
        chance.forget(slot)
        root, sources, lengths = 0, [], []
        while root < last:
            own = length[root : root + 1]
            chances = chance(slot, own)[0]
            index = choose(root, sources, chances)
            block, template = self.blocks[index], self.template_of[index]
            if template is None or self.walker is None:
                emitted, left = 1, sources[1:]
            else:
                _, _, emitted, left = self.walker.step(by_place, root, sources, template)
            copied = min(taken[root], block.copies, last - root - 1)
            if copied >= emitted:
                left = left[copied + 1 - emitted :]
                emitted = copied + 1
            if copied and copied + 1 == emitted and copied in block.groups:
                group = block.groups[copied]
                left = [(root + copied, mask) for mask in range(group)] + left[group:]
            agreed = min(taken[root], emitted)
            refused = int(agreed < min(emitted, MAX_COPIES))
            chance.count(slot, np.array([[agreed, refused]]))
            sources = left
            root += emitted
            lengths.append(emitted)
        return lengths


class ExpectedTokens:
    """Chooses the block that promises most tokens, now and in the steps after.

    promise = promise of the tree (tree/choice.py) + sum over copies d of C(d) * (1 - T(d))
              - C(1) * (1 - T(1)) * value(all predictions) + sum over d of P(d copies are right) * value(d's group)

    C(d) = chance(1) * ... * chance(d), T(d) = P(the tree's walk reaches depth d), taken as independent. A walk that
    ends on a copy leaves the next step no predictions but those of a group under the copy.
    """

    def __init__(
        self,
        blocks: Sequence[MixedBlock],
        # the template whose values of left-over predictions count
        first: Template,
        # [ages, 2, k, ranks]
        acceptance: np.ndarray,
    ) -> None:
        root = TreeShape((-1,), (-1,), (0,))
        trees = TreeBatch.of(
            [root if block.template is None else block.template.shape for block in blocks]
        )
        self.value = state_values(TreeBatch.of([first.shape]), acceptance)
        self.weight = promise_weight(trees, self.value, acceptance)
        self.often = promise_weight(trees, np.zeros_like(self.value), acceptance)  # q alone
        self.depth, self.parent = trees.depth(), np.maximum(trees.parent, 0)
        self.is_draft = trees.rank >= 0
        self.weight[:, 1:][~self.is_draft[:, 1:]] = 0.0  # padding
        self.rank = np.maximum(trees.rank, 0)
        self.line = np.arange(len(blocks))[:, None]
        self.num_masks = acceptance.shape[2]
        self.is_at = np.stack(
            [self.depth == d for d in range(1, self.num_masks + 1)], axis=-1
        ).astype(float)
        self.in_chain = np.arange(1, MAX_COPIES + 1) <= np.array([[b.copies] for b in blocks])
        # the root alone leaves no predictions for the next step
        self.left = np.array([0.0 if b.template is None else self.value[-1] for b in blocks])
        self.group_value = np.zeros((len(blocks), MAX_COPIES))
        for i, block in enumerate(blocks):
            for copy, group in block.groups.items():
                self.group_value[i, copy - 1] = self.value[(1 << group) - 1]

    def promise(
        self,
        # [n, k, ranks]
        probabilities: np.ndarray,
        sources: Sources,
        # [MAX_COPIES]
        chances: np.ndarray,
    ) -> np.ndarray:
        """`[blocks]`"""
        known = np.zeros((self.num_masks + 1, probabilities.shape[2]))
        for depth, (place, mask) in enumerate(sources[: self.num_masks], start=1):
            known[depth] = probabilities[place, mask]
        own = np.where(self.is_draft, known[self.depth, self.rank], 1.0)
        reach, parent = own, self.parent
        for _ in range(self.num_masks - 1):
            reach = reach * own[self.line, parent]
            parent = self.parent[self.line, parent]
        tree = (reach * self.weight).sum(axis=1)
        in_tree = ((reach * self.often)[:, None] @ self.is_at)[:, 0]  # [blocks, k]
        chain = np.cumprod(chances) * self.in_chain
        beyond = chain.copy()
        beyond[:, : self.num_masks] *= 1 - np.minimum(in_tree, 1.0)
        stops = chain - np.append(chain[:, 1:], np.zeros((len(chain), 1)), axis=1)
        lost = beyond[:, 0] * self.left
        regained = (stops * self.group_value).sum(axis=1)
        return tree + beyond.sum(axis=1) - lost + regained

    def __call__(self, probabilities: np.ndarray) -> Choice:
        def choose(place: int, sources: Sources, chances: np.ndarray) -> int:
            return int(self.promise(probabilities, sources, chances).argmax())

        return choose

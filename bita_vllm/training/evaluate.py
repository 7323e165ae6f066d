"""How good an adapter's drafts are: accuracy of each mask, acceptance statistics, accepted length.

Measured on the base model's own greedy answers. The ranks of the answers' tokens in the mask rows'
predictions are computed once (`answer_ranks`), by the model code of training, so adapters with
low-rank deltas are measured too; the rest follows from the ranks alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bita_vllm.adapter.config import CONFIG_FILE, AdapterConfig, AdapterError
from bita_vllm.system.atomic_write import write_text
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.samples import Sample
from bita_vllm.tree import Template, TemplateError
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.replay import NO_RANK, Sources, TreeWalker
from bita_vllm.tree.template_set import TemplateSet, set_within

AUTO = "auto"
NUM_RANKS = 10
REFERENCE_WIDTHS = (5, 4, 3)  # the paper's tree; deeper masks get the last width
CONDITION = (
    "over the nodes that greedy decoding with reference_tree reached (all tokens before accepted) and that had "
    "candidates from that mask"
)
SMOOTHING = 10  # places that the mean counts as, where a condition was met seldom


@dataclass(frozen=True)
class Predictions:
    """What the masks said about the answers, by answer of n tokens.

    Attributes:
        ranks: `[n, k]` int32: entry (i, j) is the rank of answer token i+2+j in the prediction of mask index
            j of a group under answer token i; NO_RANK after the answer's end. Rank 0 is the most likely
            token; of equal logits the smaller id comes first.
        probabilities: `[n, k, NUM_RANKS]` float32, of the candidates in the same predictions, best first;
            zeros after the answer's last but two tokens, where no group has anything to predict.
    """

    ranks: list[np.ndarray]
    probabilities: list[np.ndarray]


@torch.no_grad()
def answer_predictions(
    model: MaskModel,
    samples: Sequence[Sample],
    max_positions: int,
    chunk_groups: int = 128,
) -> Predictions:
    """The masks' predictions along the answers, a group under every token.

    Stops before the sample that would bring the mask groups to more than `max_positions` (never before the
    first).
    """
    found = Predictions([], [])
    device = model.mask_embeddings.device
    total = min(max_positions, sum(len(sample.answer_ids) for sample in samples))
    with tqdm(total=total, desc="evaluating", unit="position") as bar:
        for sample in samples:
            if found.ranks and sum(map(len, found.ranks)) + len(sample.answer_ids) > max_positions:
                break
            ids = torch.tensor(sample.prompt_ids + sample.answer_ids, device=device)
            first, n = len(sample.prompt_ids), len(sample.answer_ids)
            ranks = np.full((n, model.num_masks), NO_RANK, dtype=np.int32)
            probabilities = np.zeros((n, model.num_masks, NUM_RANKS), dtype=np.float32)
            context = model.context(ids[None])
            # The group under the answer's last but one token has nothing to predict.
            for start in range(0, n - 2, chunk_groups):
                roots = torch.arange(first + start, first + min(start + chunk_groups, n - 2))
                rows = slice(start, start + len(roots))
                logits = model.mask_logits(context, roots[None].to(device))[0]
                ranks[rows] = _target_ranks(logits, ids, roots.to(device)).cpu().numpy()
                # A tiny vocabulary may have fewer tokens than ranks.
                best = logits.softmax(-1).topk(min(NUM_RANKS, logits.shape[-1])).values
                probabilities[rows, :, : best.shape[-1]] = best.float().cpu().numpy()
            found.ranks.append(ranks)
            found.probabilities.append(probabilities)
            bar.update(n)
    return found


def answer_ranks(
    model: MaskModel,
    samples: Sequence[Sample],
    max_positions: int,
) -> list[np.ndarray]:
    """The ranks alone."""
    return answer_predictions(model, samples, max_positions).ranks


def _target_ranks(
    # [G, k, V]
    logits: torch.Tensor,
    # [T] the whole text
    ids: torch.Tensor,
    # [G] places of the roots in it
    roots: torch.Tensor,
) -> torch.Tensor:
    """`[G, k]` int32 rank of the text's token in each mask row's prediction."""
    places = roots[:, None] + 2 + torch.arange(logits.shape[1], device=roots.device)
    exists = places < len(ids)
    targets = ids[places.clamp(max=len(ids) - 1)][..., None]  # [G, k, 1]
    own = logits.gather(-1, targets)
    tokens = torch.arange(logits.shape[-1], device=roots.device)
    before = (logits > own) | ((logits == own) & (tokens < targets))
    return torch.where(exists, before.sum(-1), NO_RANK).int()


@dataclass(frozen=True)
class MaskAccuracy:
    """How often a mask's first r candidates hold the token, over all places of all answers.

    Attributes:
        top: `[k, NUM_RANKS]`, entry (j, r-1) for mask index j and its first r candidates.
        num_positions: `[k]` places that mask index j had a token to predict for.
    """

    top: np.ndarray
    num_positions: np.ndarray


def mask_accuracy(ranks: Sequence[np.ndarray]) -> MaskAccuracy:
    """From the ranks of all answers; 0 where there was nothing to predict."""
    rows = np.concatenate(ranks)  # [positions, k]
    num = (rows != NO_RANK).sum(axis=0)
    hits = (rows[:, :, None] <= np.arange(NUM_RANKS)).sum(axis=0)  # [k, NUM_RANKS]
    return MaskAccuracy(hits / np.maximum(num, 1)[:, None], num)


def accepted_lengths(template: Template, ranks: Sequence[np.ndarray]) -> list[list[int]]:
    """Accepted length of every step after prefill, by answer."""
    walker = TreeWalker(template)
    return [walker.replay(rows).lengths for rows in ranks]


def chosen_lengths(
    templates: TemplateSet,
    # [ages, 2, k, ranks], what the engine values left-over predictions by
    acceptance: np.ndarray,
    predictions: Predictions,
) -> list[list[int]]:
    """As `accepted_lengths`, where each step takes the template that promises most."""
    walker = TreeWalker(*templates.templates)
    choose = template_choice(templates, acceptance)
    answers = zip(predictions.ranks, predictions.probabilities, strict=True)
    return [walker.replay(ranks, partial(choose, given)).lengths for ranks, given in answers]


def template_choice(
    templates: TemplateSet,
    # [ages, 2, k, ranks]
    acceptance: np.ndarray,
) -> Callable[[np.ndarray, Sources], int]:
    """(an answer's probabilities, a step's sources) -> which template of the set the engine takes."""
    ladder = Ladder.fixed(templates)
    choice = LineChoice(ladder, acceptance, torch.device("cpu"))

    def choose(given: np.ndarray, sources: Sources) -> int:
        sources = sources[: templates.max_depth]
        if not sources:
            return 0
        known = np.zeros((1, templates.max_depth, given.shape[2]), dtype=np.float32)
        known[0, : len(sources)] = given[tuple(zip(*sources, strict=True))]
        depths = torch.tensor([len(sources)])
        line = int(choice(0, depths, torch.from_numpy(known)))
        return int(ladder.table.template_of(line))

    return choose


def acceptance_statistics(ranks: Sequence[np.ndarray]) -> dict[str, Any]:
    """The table that template choice needs (`tree.search.acceptance_table`), and what it is over.

    `rank_probability` `[k][NUM_RANKS]` is P(the candidate of rank r of mask j is the token | the
    tokens before it were accepted). Which places that leaves depends on the tree: they are those
    that decoding with the reference tree comes to, and all ranks are counted there, in the tree or
    not. A mask that was never reached has zeros, and `num_positions` says so.

    `conditional_rank_probability` `[k ages][2][k][NUM_RANKS]` is what `tuning.process` goes by: apart
    by age of the prediction, and by whether the token before was its parent's top candidate (0) or a
    lower one (1), after which acceptance is far lower.
    """
    num_masks = ranks[0].shape[1]
    widths = [REFERENCE_WIDTHS[min(j, len(REFERENCE_WIDTHS) - 1)] for j in range(num_masks)]
    walker = TreeWalker(Template.from_widths(widths, num_masks))
    counts = np.zeros((num_masks, NUM_RANKS + 1), dtype=np.int64)
    for rows in ranks:
        for mask_index, rank in walker.replay(rows).candidates:
            counts[mask_index, min(rank, NUM_RANKS)] += 1
    num = counts.sum(axis=1)
    probability = counts[:, :NUM_RANKS] / np.maximum(num, 1)[:, None]
    conditional = conditional_counts(ranks, widths)
    return {
        "rank_probability": [[round(p, 6) for p in row] for row in probability.tolist()],
        "num_positions": num.tolist(),
        "reference_tree": ",".join(map(str, widths)),
        "condition": CONDITION,
        "conditional_rank_probability": np.round(_smoothed(conditional), 6).tolist(),
        "conditional_num_positions": conditional.sum(axis=-1).tolist(),
    }


def conditional_counts(ranks: Sequence[np.ndarray], widths: Sequence[int]) -> np.ndarray:
    """`[k ages, 2, k masks, NUM_RANKS + 1]` at which rank candidates held the token; last: at none of these.

    `widths` is the branching of a tree in which *every* node has children, so many at each depth. Every answer is
    replayed twice in it: with a mask group under every node, which counts age 0, and with one under the root only,
    which counts the older predictions. Axis 1 is 1 where the token before was not its parent's top candidate.
    """
    k = len(widths)
    counts = np.zeros((k, 2, k, NUM_RANKS + 1), dtype=np.int64)
    for rows in ranks:
        by_place = rows.tolist()
        for only_root in (False, True):
            root, group, first_mask = (
                0,
                -1,
                k,
            )  # the group's predictions are used from this mask index on
            while root < len(by_place) - 1:
                depth, lower = 0, 0
                for mask in range(first_mask, k):
                    rank = by_place[group][mask]
                    if only_root == (first_mask > 0):
                        counts[first_mask, lower, mask, min(rank, NUM_RANKS)] += 1
                    if rank >= widths[depth] or root + depth + 1 == len(by_place) - 1:
                        break
                    depth, lower = depth + 1, int(rank > 0)
                group, first_mask = (root, depth) if only_root else (root + depth, 0)
                root += depth + 1
    return counts


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """Probability of each rank, shrunk towards the mask's mean where it was seen seldom."""
    of_mask = counts.sum(axis=(0, 1))  # [k, NUM_RANKS + 1]
    mean = of_mask / np.maximum(of_mask.sum(axis=-1, keepdims=True), 1)
    total = counts.sum(axis=-1, keepdims=True)
    return ((counts + SMOOTHING * mean) / (total + SMOOTHING))[..., :NUM_RANKS]


def save_acceptance(adapter_dir: Path, statistics: dict[str, Any]) -> None:
    """Put the statistics into the adapter's config.json, which is written whole. Raises AdapterError."""
    path = adapter_dir / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["acceptance"] = statistics
        write_text(path, json.dumps(raw, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The acceptance statistics could not be saved to {path} ({error})."
        ) from error


def budget_of(spec: str) -> int | None:
    """24 of 'auto:24'; None for every other tree."""
    name, _, rows = spec.partition(":")
    return int(rows) if name == AUTO and rows.isdigit() else None


def parse_tree(
    spec: str, config: AdapterConfig, acceptance: Mapping[str, Any] | None
) -> TemplateSet:
    """'5,4,3', 'auto' (the adapter's row budget), 'auto:24' (at most 24 rows), or a template file.

    `acceptance` is what 'auto' chooses by (None: the default). Raises TemplateError.
    """
    if spec == AUTO or budget_of(spec):
        budget = budget_of(spec) or config.speculative_tokens + 1
        return set_within(budget, config.num_mask_tokens, acceptance)
    template = Template.from_text(spec, config.num_mask_tokens)
    if template is None:
        raise TemplateError(
            f"Tree {spec!r} is neither 'auto', 'auto:ROWS', widths per depth such as '5,4,3', "
            "nor an existing template file."
        )
    return TemplateSet((template,))

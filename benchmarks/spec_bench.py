"""Copies and masks on Spec-Bench's tasks, offline: how likely copies are, and accepted lengths of blocks of both.

    python benchmarks/spec_bench.py chances SPEC_BENCH.jsonl
    python benchmarks/spec_bench.py replay SPEC_BENCH.jsonl

Prompts: Spec-Bench's categories (WMT14 de-en, CNN/Daily Mail, Natural Questions without and with passages, GSM8K) from
the file given, and MT-Bench's first turns. Answers: the embedded model's, greedy, fp32. They and the masks' predictions
along them are made once (`spec_bench_answers.py`). For evaluation only, never for training.

`chances` judges estimators of P(a copy is right | those before it are) by their log loss on tasks that no table was
fitted to. `replay` decodes the answers again (`testbed/copy_replay.py`): masks alone, copies alone, both at fixed
lengths, and a choice for each step. Accepted lengths are over all steps of a task; `first_96` ends answers there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bita_kernels.copy_rules import MAX_COPIES
from cpu_throughput import RESULTS, ROOT, rounded, write_csv
from provenance import provenance
from spec_bench_answers import (
    TASKS,
    Answer,
    cache_folder,
    make_answers,
    make_predictions,
    read_tasks,
)
from testbed.copy_replay import Choice, Copies, ExpectedTokens, MixedBlock, MixedWalker

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.embedded import embedded_model_dir
from bita_vllm.step.copy_chance import CopyChance, agreement
from bita_vllm.tree import Template
from bita_vllm.tree.search import MIN_ROWS, acceptance_table
from bita_vllm.tree.template_set import set_within

Recorded = Sequence[tuple[Answer, Copies]]
SHORT = 96  # tokens of an answer

# --- Chances --------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 4, 6, 9, 16, 32)  # shortest matches of the tables' rows
# The tables are fitted on one half and judged on the other, and the other way round.
HALVES = (("mt_bench", "rag", "translation"), ("summarization", "qa", "math_reasoning"))
SMOOTHING = 10  # copies that a row's mean counts as in its cells
EDGE = 1e-3  # chances are kept that far from 0 and 1


def judged_copies(copies: Copies) -> np.ndarray:
    """`[N, 4]` length of the match, place in the copy, 1 if it was right, place in the answer.

    Of all copies whose predecessors were right.
    """
    found = [
        (length, i, i < taken, place)
        for place, (length, taken, known) in enumerate(
            zip(copies.length, copies.taken, copies.known, strict=True)
        )
        if length
        for i in range(min(taken + 1, known))
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def fitted_tables(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Each `[lengths, MAX_COPIES]`: one chance for all, by length, by length and place."""
    counts = np.zeros((2, len(LENGTHS), MAX_COPIES))
    np.add.at(counts, (rows[:, 2], _row(rows[:, 0]), rows[:, 1]), 1)
    hits, total = counts[1], counts.sum(axis=0)
    of_length = hits.sum(axis=1, keepdims=True) / np.maximum(total.sum(axis=1, keepdims=True), 1)
    return {
        "one chance": np.full_like(hits, hits.sum() / total.sum()),
        "table: length of match": np.broadcast_to(of_length, hits.shape),
        "table: length of match, place": (hits + SMOOTHING * of_length) / (total + SMOOTHING),
    }


def _row(lengths: np.ndarray) -> np.ndarray:
    return np.searchsorted(LENGTHS, lengths, side="right") - 1


def corrected(copies: Copies) -> np.ndarray:
    """`[n, MAX_COPIES]` chances of a request that takes one token a step."""
    chance, slot = CopyChance(1), np.zeros(1, dtype=np.int64)
    found = np.zeros((len(copies.length), MAX_COPIES))
    for place, (length, taken) in enumerate(zip(copies.length, copies.taken, strict=True)):
        found[place] = chance(slot, np.array([length]))[0]
        chance.count(slot, np.array([[taken > 0, taken == 0]]) * (length > 0))
    return found


def log_loss(chances: np.ndarray, right: np.ndarray) -> np.ndarray:
    chances = np.clip(chances, EDGE, 1 - EDGE)
    return -np.where(right, np.log(chances), np.log(1 - chances))


def compare_chances(recorded: Recorded) -> list[dict[str, Any]]:
    """Mean log loss of each estimator, by half of the tasks that it is judged on."""
    rows = [judged_copies(copies) for _, copies in recorded]
    by_half = [
        [i for i, (answer, _) in enumerate(recorded) if answer.task in half] for half in HALVES
    ]
    found = []
    for own, other in ((0, 1), (1, 0)):
        of_half = np.concatenate([rows[i] for i in by_half[own]])
        length, place, right, _ = of_half.T
        fitted = fitted_tables(np.concatenate([rows[i] for i in by_half[other]]))
        chances = {name: table[_row(length), place] for name, table in fitted.items()}
        chances["m / (m + 2)"] = agreement(length + place)
        chances["m / (m + 2), corrected"] = np.concatenate(
            [corrected(recorded[i][1])[rows[i][:, 3], rows[i][:, 1]] for i in by_half[own]]
        )
        chances["table fitted here"] = fitted_tables(of_half)["table: length of match, place"][
            _row(length), place
        ]
        found += [
            {
                "judged_on": " ".join(HALVES[own]),
                "copies": len(right),
                "estimator": name,
                "log_loss": float(log_loss(of_name, right == 1).mean()),
            }
            for name, of_name in chances.items()
        ]
    return found


# --- Replay ---------------------------------------------------------------------------------------


class Blocks:
    """Blocks of masks and copies within row budgets, from an adapter's template sets."""

    def __init__(self, adapter: Path) -> None:
        config = AdapterConfig.load(adapter)
        self.acceptance, self.num_masks = config.acceptance, config.num_mask_tokens
        self.table = acceptance_table(config.acceptance, config.num_mask_tokens)

    def trees(self, rows: int) -> list[Template | None]:
        """The set for a row budget; the root alone where no tree fits."""
        if rows < MIN_ROWS:
            return [None]
        return list(set_within(rows, self.num_masks, self.acceptance).templates)

    def within(self, rows: int, lengths: Sequence[int]) -> list[MixedBlock]:
        """Trees of the rows that copies of each length leave."""
        return [
            MixedBlock(tree, length)
            for length in lengths
            if length < rows
            for tree in self.trees(rows - length)
        ]

    def choice(self, blocks: Sequence[MixedBlock], rows: int) -> Callable[[np.ndarray], Choice]:
        first = self.trees(max(rows // 2, MIN_ROWS + 2))[0]
        assert first is not None
        return ExpectedTokens(blocks, first, self.table)


FIRST = "first tree"
CHOICE = "choice"
ARMS = {
    # rows: (what, lengths of the copies to choose from)
    8: (("masks", (0,)), ("copies", (7,)), ("both", (0, 2, 3, 4, 5, 6, 7))),
    16: (("masks", (0,)), ("copies", (15,)), ("both", (0, 3, 5, 7, 9, 11, 15))),
    24: (("masks", (0,)), ("both", (0, 3, 7, 11, 15))),
    52: (("masks", (0,)), ("both", (0, 3, 7, 15))),
}


def arms(blocks: Blocks) -> Iterator[tuple[dict[str, Any], list[MixedBlock]]]:
    """(what it is called, blocks to choose from)"""
    for rows, of_rows in ARMS.items():
        for what, lengths in of_rows:
            own = (
                [MixedBlock(None, lengths[0])] if what == "copies" else blocks.within(rows, lengths)
            )
            how = CHOICE if len(own) > 1 else FIRST
            yield (
                {"rows": rows, "drafts": what, "copies": " ".join(map(str, lengths)), "how": how},
                own,
            )
    for rows, length in ((16, 7), (52, 7)):
        first = blocks.trees(rows)[0]
        yield (
            {"rows": rows + length, "drafts": "both", "copies": str(length), "how": FIRST},
            [MixedBlock(first, length)],
        )


def accepted_lengths(
    recorded: Recorded, own: Sequence[MixedBlock], choice: Callable[[np.ndarray], Choice] | None
) -> dict[str, float]:
    """By task, and the mean of the tasks."""
    walker, chance = MixedWalker(own), CopyChance(1)
    tokens, steps = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for answer, copies in recorded:
        choose = {} if choice is None else {"choose": choice(answer.probabilities)}
        lengths = walker.replay(answer.ranks, copies, chance, **choose)
        tokens[answer.task] += sum(lengths)
        steps[answer.task] += len(lengths)
    found = {task: tokens[task] / max(steps[task], 1) for task in TASKS}
    return {**found, "mean": float(np.mean(list(found.values())))}


def replay(recorded: Recorded, blocks: Blocks) -> Iterator[dict[str, Any]]:
    short = [(replace(answer, ranks=answer.ranks[:SHORT]), copies) for answer, copies in recorded]
    for names, own in arms(blocks):
        choice = blocks.choice(own, names["rows"]) if names["how"] == CHOICE else None
        found = accepted_lengths(recorded, own, choice)
        yield {**names, **found, f"first_{SHORT}": accepted_lengths(short, own, choice)["mean"]}


# --- Command line ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("question", choices=("chances", "replay"))
    add("spec_bench", type=Path, help="Spec-Bench's questions, JSON lines")
    add("--adapter", type=Path, default=ROOT / "adapters" / "smollm2-135m-instruct")
    add("--num-prompts", type=int, default=20, help="of each task (default: 20)")
    add("--max-tokens", type=int, default=192, help="of an answer (default: 192)")
    add("--out", type=Path, help="CSV (default: results/spec_bench_QUESTION.csv)")
    args = parser.parse_args()
    model, folder = str(embedded_model_dir()), cache_folder()
    answers = make_answers(
        model, read_tasks(args.spec_bench), args.num_prompts, args.max_tokens, folder
    )
    recorded = [
        (answer, Copies.of(answer.sample.prompt_ids, answer.sample.answer_ids))
        for answer in make_predictions(model, args.adapter, answers, folder)
    ]
    facts = {
        "prompts_per_task": args.num_prompts,
        "max_tokens": args.max_tokens,
        "tokens": sum(len(answer.ranks) for answer, _ in recorded),
        **provenance(),
    }
    found = (
        compare_chances(recorded)
        if args.question == "chances"
        else replay(recorded, Blocks(args.adapter))
    )
    rows = []
    for row in found:
        rows.append(rounded({**row, **facts}))
        print(*(rows[-1][key] for key in row), sep="\t", flush=True)
    write_csv(args.out or RESULTS / f"spec_bench_{args.question}.csv", rows)


if __name__ == "__main__":
    main()

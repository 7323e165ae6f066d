"""Accepted length predicted from statistics of some answers, beside replaying others."""

import numpy as np
from recorded_ranks import recorded_ranks

from bita_vllm.training.evaluate import acceptance_statistics, accepted_lengths
from bita_vllm.tree import Template
from bita_vllm.tree_search import acceptance_table, best_templates, long_run_of

BUDGETS = (4, 8, 16, 32)


def templates(acceptance):
    found = dict(zip(BUDGETS, best_templates(BUDGETS, acceptance), strict=True))
    return {f"best of {rows} rows": t for rows, t in found.items()} | {
        "chain": Template.from_widths([1, 1, 1], 3),
        "5,4,3": Template.from_widths([5, 4, 3], 3),
    }


def errors(seen, other):
    """Predicted from statistics of the answers `seen`, beside replaying `other`: relative error by template."""
    acceptance = acceptance_table(acceptance_statistics(seen), 3)
    found = {}
    for name, template in templates(acceptance).items():
        replayed = np.concatenate(accepted_lengths(template, other)).mean()
        predicted = long_run_of(template, acceptance).accepted_length[0]
        found[name] = predicted / replayed - 1
        print(f"{name:16} predicted {predicted:.3f} replayed {replayed:.3f} {found[name]:+.1%}")
    return found.values()


def test_predicted_accepted_length_is_the_replayed_one():
    """What the model of the process leaves out, without sampling error: the same answers."""
    for answers in ("own_prompts", "mt_bench"):
        found = errors(recorded_ranks(answers), recorded_ranks(answers))
        assert max(map(abs, found)) < 0.03


def test_statistics_of_one_set_of_prompts_hold_on_another():
    """Of the model's own prompts, on MT-Bench; training saw neither."""
    assert max(map(abs, errors(recorded_ranks("own_prompts"), recorded_ranks("mt_bench")))) < 0.03


def test_statistics_of_some_answers_hold_on_others():
    """Every other answer of both sets predicts the rest."""
    answers = recorded_ranks("own_prompts") + recorded_ranks("mt_bench")
    assert max(map(abs, errors(answers[::2], answers[1::2]))) < 0.03

"""Accepted length predicted from statistics of some answers, beside replaying others."""

import numpy as np
import pytest
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


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out answers", "the same answers"])
def test_predicted_accepted_length_is_the_replayed_one(held_out):
    """Six templates within 3% on answers that the statistics have not seen."""
    answers = recorded_ranks("own_prompts")
    seen, other = (answers[::2], answers[1::2]) if held_out else (answers, answers)
    acceptance = acceptance_table(acceptance_statistics(seen), 3)
    errors = {}
    for name, template in templates(acceptance).items():
        lengths = np.concatenate(accepted_lengths(template, other))
        predicted = long_run_of(template, acceptance).accepted_length[0]
        errors[name] = predicted / lengths.mean() - 1
        print(
            f"{name:16} predicted {predicted:.3f} replayed {lengths.mean():.3f} {errors[name]:+.1%}"
        )
    assert max(map(abs, errors.values())) < 0.03


def test_statistics_of_one_set_of_prompts_hold_on_another():
    """Of prompts that are in the adapter's training data, on MT-Bench, which is not: five of six within 3%."""
    acceptance = acceptance_table(acceptance_statistics(recorded_ranks("own_prompts")), 3)
    errors = []
    for name, template in templates(acceptance).items():
        lengths = np.concatenate(accepted_lengths(template, recorded_ranks("mt_bench")))
        predicted = long_run_of(template, acceptance).accepted_length[0]
        print(f"{name:16} predicted {predicted:.3f} replayed {lengths.mean():.3f}")
        errors.append(abs(predicted / lengths.mean() - 1))
    assert sorted(errors)[4] < 0.03
    assert max(errors) < 0.035

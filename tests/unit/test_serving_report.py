"""What `benchmarks/serving.py` computes from its measurements: ratios, intervals, the report."""

import csv
import math

import pytest
from scipy import stats
from serving_report import beside_plain, decode_figures, interval, report, summarise


def row(arm, repeat, rate, concurrency=1, **columns):
    return {
        "model": "tiny",
        "dtype": "float32",
        "device": "a CPU",
        "vllm": "0.32.0",
        "git_sha": "abc",
        "date": "2026-01-01",
        "max_tokens": 64,
        "servers": "all up",
        "dataset": "mt-bench",
        "concurrency": concurrency,
        "arm": arm,
        "repeat": repeat,
        "prompts": 2,
        "tokens_per_s": rate,
        "ttft_p50_ms": 10.0,
        "ttft_p99_ms": 20.0,
        "tpot_p50_ms": 1000 / rate,
        "tpot_p99_ms": 2000 / rate,
        "accepted_length": 1.0 if arm == "plain" else 1.5,
        "rows": "",
        **columns,
    }


MEASURED = [
    row("bita-auto", 0, 150.0), row("plain", 0, 100.0),
    row("plain", 1, 200.0), row("bita-auto", 1, 240.0),
    row("plain", 2, 100.0), row("bita-auto", 2, 130.0, rows=8),
]  # fmt: skip
ANSWERS = {
    ("plain", "mt-bench", 1, 0): ["a", "b"],
    ("bita-auto", "mt-bench", 1, 0): ["a", "c"],
    ("plain", "mt-bench", 1, 1): ["a", "b"],
    ("bita-auto", "mt-bench", 1, 1): ["a", "b"],
    ("plain", "mt-bench", 1, 2): ["a", "b"],
    ("bita-auto", "mt-bench", 1, 2): ["x", "y"],
}


def test_ratio_is_taken_within_a_repeat():
    ratios = [r["ratio"] for r in beside_plain(MEASURED, ANSWERS) if r["arm"] != "plain"]
    assert ratios == [1.5, 1.2, 1.3]


def test_different_answers_are_counted_against_plains_of_the_same_repeat():
    rows = beside_plain(MEASURED, ANSWERS)
    assert [r["different_answers"] for r in rows] == [1, 0, 0, 0, 0, 2]


def test_a_point_that_plain_has_not_measured_yet_has_no_ratio():
    answers = {key: texts for key, texts in ANSWERS.items() if key[0] != "plain"}
    rows = beside_plain([row("bita-auto", 0, 150.0)], answers)
    assert rows[0]["ratio"] == rows[0]["different_answers"] == ""


def test_interval_is_students_on_log_ratios():
    low, high = interval([1.5, 1.2, 1.3])
    logs = [math.log(r) for r in (1.5, 1.2, 1.3)]
    reference = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((math.exp(reference.low), math.exp(reference.high)))
    assert interval([1.5]) is None, "one repeat says nothing about the spread"
    assert interval([1.25, 1.25]) == pytest.approx((1.25, 1.25))


def test_interval_covers_the_true_ratio_as_often_as_it_says():
    import numpy as np

    samples = np.exp(np.random.default_rng(0).normal(math.log(1.3), 0.1, size=(2000, 5)))
    covered = [low <= 1.3 <= high for low, high in map(interval, samples.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("output_tokens", "requests", "accepted", "drafted", "expected"),
    [
        (130, 2, 0, 0, (1.0, 1.0)),
        (130, 2, 64, 320, (2.0, 6.0)),  # 64 steps, 5 drafts in each
        (130, 2, 28, 50, (1.28, 1.5)),  # a step in two had a draft
        (2, 2, 0, 0, ("", "")),  # answers of one token: no decode step
    ],
)
def test_accepted_length_and_rows_count_every_decode_step(
    output_tokens, requests, accepted, drafted, expected
):
    assert decode_figures(output_tokens, requests, accepted, drafted) == expected


def test_summary_takes_medians_over_repeats():
    plain, auto = sorted(summarise(beside_plain(MEASURED, ANSWERS)), key=lambda p: p.arm != "plain")
    assert (plain.tokens_per_s, plain.ratio, plain.ratio_interval) == (100.0, 1.0, (1.0, 1.0))
    assert (auto.tokens_per_s, auto.ratio, auto.repeats) == (150.0, 1.3, 3)
    assert auto.ratio_interval == pytest.approx(interval([1.5, 1.2, 1.3]))
    assert (auto.different, auto.answers) == (3, 6)
    assert auto.rows == 8


def test_report_is_made_from_the_csv_alone(tmp_path):
    path = tmp_path / "serving.csv"
    one_token_answers = {"tpot_p50_ms": "", "tpot_p99_ms": "", "accepted_length": ""}
    last = [row("plain", 0, 50.0, 4), row("bita-auto", 0, 70.0, 4, **one_token_answers)]
    rows = beside_plain([*MEASURED, *last], ANSWERS)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = report(path).read_text()
    assert "## mt-bench" in text
    assert "| 1 | bita-auto | 150.0 | **1.30** [" in text
    assert "| 4 | bita-auto | 70.0 | **1.40** | 10 / 20 |  |  |" in text, (
        "no interval from one repeat"
    )
    assert "3 of 6" in text
    for name in ("serving_ratio.png", "serving_frontier.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in text

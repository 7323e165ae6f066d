"""What `benchmarks/soak.py` asks, and what it calls a fault."""

from dataclasses import replace

import pytest
from soak import BITA, LEGS, PLAIN, Result, faults, rows_of, table
from soak_client import Answer
from soak_compare import Difference
from soak_requests import MIX, count_by_kind, follows_schema, requests
from soak_server import State
from soak_worker import container_sizes
from testbed.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer(935)
MADE = requests(40, TOKENIZER, "model", 200, 32, seed=0)


def test_requests_are_seeded_and_mixed():
    assert requests(40, TOKENIZER, "model", 200, 32, seed=0) == MADE
    assert requests(40, TOKENIZER, "model", 200, 32, seed=1) != MADE
    assert count_by_kind(MADE) == {kind: 2 * count for kind, count in MIX.items()}


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ('{"city": "Oslo", "sunny": true}', True),
        ('{"city": "Oslo", "sunny": 1}', False),
        ('{"city": "Oslo"}', False),
        ("[]", False),
        ('{"city": ', False),
    ],
)
def test_an_answer_follows_its_schema(text, follows):
    assert follows_schema(text) == follows


def sound() -> Result:
    state = State(0, 1.0, 9, 6, 3, 1, {"front end": 10**9, "engine": 10**9}, 0.0, {"Runner.a": 2})
    states = [replace(state, requests=4 * (leg + 1)) for leg in range(LEGS)]
    arms = (PLAIN, BITA)
    answers = [Answer([[1]]) for _ in MADE]
    return Result(
        {arm: list(states) for arm in arms},
        {arm: list(answers) for arm in arms},
        {arm: [] for arm in arms},
    )


def broken(**changes) -> Result:
    """bita's last state is another one."""
    result = sound()
    result.states[BITA][-1] = replace(result.states[BITA][-1], **changes)
    return result


def test_a_sound_run_has_no_fault():
    result = sound()
    result.different = [Difference(0, 3, 0.25, 17.0)]  # two units
    assert faults(result, MADE, "bfloat16", 0.01) == []
    assert len(table(rows_of(result, MADE)).splitlines()) == 1 + 2 * LEGS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"containers": {"Runner.a": 3}}, "Runner.a had 2 entries, and 3 at the end"),
        ({"containers": {"Runner.a": 2, "Runner.b": 1}}, "Runner.b had 0 entries"),
        ({"kv_usage": 0.1}, "10.00% of the KV cache"),
        ({"rss": {"front end": 10**9, "engine": 1.02 * 10**9}}, "engine grew by 2.00%"),
    ],
)
def test_what_is_left_behind_is_a_fault(changes, words):
    (fault,) = faults(broken(**changes), MADE, "bfloat16", 0.01)
    assert words in fault


def test_what_is_lost_is_a_fault():
    result = sound()
    result.answers[BITA][0] = Answer(fault="the stream broke off")
    result.error_lines[BITA] = ["ERROR 11-28 something"]
    result.different = [Difference(0, 3, 0.375, 17.0), Difference(1, 3, 0.001, 17.0)]
    found = faults(result, MADE, "bfloat16", 0.01)
    for words, fault in zip(("broke off", "in the log", "token 3"), found, strict=True):
        assert words in fault
    assert len(faults(result, MADE, "float32", 0.01)) == 4


def test_containers_are_counted_where_objects_of_ours_hold_them():
    class Held:
        __module__ = "bita_vllm.somewhere"

        def __init__(self):
            self.entries = {1: 2, 3: 4}

    class Owner:
        def __init__(self):
            self.requests = [Held(), Held()]
            self.held = Held()

    sizes = container_sizes(Owner())
    assert sizes["Owner.requests"] == 2
    assert sizes["Held.entries"] == 6

"""Accounts of requests' blocks: who rests, for how long, and what ends it."""

import numpy as np
import pytest

from bita_vllm.scheduling.accounts import CREDIT, FIRST_REST, LIMIT, LONGEST_REST, Accounts
from bita_vllm.tree import NO_BLOCK, Template, TemplateTable

TABLE = TemplateTable(Template.build([(0, 0), (1, 0)], {0: 2}))  # lines of 3, 4 and 5 rows
PRICE = 0.125
LOSS = 4 * PRICE  # of a whole block that wins nothing
NUM_BLOCKS = round(LIMIT / LOSS)  # until the account is overdrawn
NUM_IN_TRIAL = round(CREDIT / LOSS)


def serve(book, names, wins, steps, price=PRICE):
    """Steps of the engine: whole blocks but for those that rest; who rested, by step."""
    rested = []
    for _ in range(steps):
        resting = set(book.resting)
        line = np.array([NO_BLOCK if name in resting else 2 for name in names])
        node = np.array([wins[name] for name in names])
        book.settle(names, line, node, price)
        rested.append(resting)
    return rested


def test_a_request_whose_blocks_lose_rests_and_the_others_go_on():
    book = Accounts(TABLE)
    rested = serve(book, ["good", "poor"], {"good": 1, "poor": 0}, NUM_BLOCKS + FIRST_REST + 1)
    assert [len(r) for r in rested] == [0] * NUM_BLOCKS + [1] * FIRST_REST + [0]
    assert set().union(*rested) == {"poor"}


def test_every_trial_that_fails_doubles_the_rest():
    book = Accounts(TABLE)
    resting = [bool(r) for r in serve(book, ["poor"], {"poor": 0}, 6 * LONGEST_REST)]
    edges = np.flatnonzero(np.diff(resting))
    lengths = np.diff(edges)[::2].tolist()
    assert lengths[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]
    assert lengths[-1] == LONGEST_REST
    assert set(np.diff(edges)[1::2].tolist()) == {NUM_IN_TRIAL}


def test_blocks_that_pay_again_end_the_rest_and_shorten_the_next():
    book = Accounts(TABLE)
    serve(book, ["a"], {"a": 0}, NUM_BLOCKS + FIRST_REST + NUM_IN_TRIAL + 2 * FIRST_REST)
    assert not any(serve(book, ["a"], {"a": 2}, 20))
    rested = serve(book, ["a"], {"a": 0}, 2 * NUM_BLOCKS + FIRST_REST + 1)
    assert sum(map(len, rested)) == FIRST_REST


def test_savings_are_bounded():
    """A request that was right for long is found out as soon as another."""
    book = Accounts(TABLE)
    serve(book, ["a"], {"a": 2}, 1000)
    rested = serve(book, ["a"], {"a": 0}, 2 * NUM_BLOCKS + 1)
    assert rested[-1] == {"a"}


def test_accounts_follow_their_requests():
    book = Accounts(TABLE)
    wins = {"a": 1, "poor": 0, "b": 1, "new": 1}
    serve(book, ["a", "poor", "b"], wins, NUM_BLOCKS - 1)
    serve(book, ["b", "new", "poor"], wins, 1)  # another order, one gone, one come
    assert book.resting == ["poor"]
    assert serve(book, ["poor", "new", "a"], wins, 1)[0] == {"poor"}


def test_what_left_comes_back_with_a_new_account():
    book = Accounts(TABLE)
    serve(book, ["poor"], {"poor": 0}, NUM_BLOCKS)
    serve(book, ["a"], {"a": 1}, 1)
    assert serve(book, ["poor"], {"poor": 0}, 1) == [set()]
    assert not book.resting


def test_nobody_rests_where_rows_cost_nothing():
    book = Accounts(TABLE)
    assert not any(serve(book, ["a"], {"a": 0}, 1000, price=0.0))


@pytest.mark.parametrize(("line", "rows"), [(0, 3), (1, 4), (2, 5)])
def test_a_block_costs_its_own_rows(line, rows):
    book, steps = Accounts(TABLE), 0
    while not book.resting:
        book.settle(["a"], np.array([line]), np.array([0]), PRICE)
        steps += 1
    assert steps == np.ceil(LIMIT / ((rows - 1) * PRICE))

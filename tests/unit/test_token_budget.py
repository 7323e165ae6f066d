"""A step's token budget: root rows first, then prefill, then blocks."""

from dataclasses import dataclass, field

import pytest

from bita_vllm.scheduling.token_budget import leave_out_blocks, prefill_tokens, within_budget


@dataclass
class FakeRequest:
    num_tokens: int = 10
    num_computed_tokens: int = 9
    spec_token_ids: list[int] = field(default_factory=list)

    @property
    def is_prefill_chunk(self) -> bool:
        return self.num_computed_tokens < self.num_tokens - 1


def with_block(num_rows: int) -> FakeRequest:
    return FakeRequest(spec_token_ids=[0] * (num_rows - 1))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, [0, 27, 27, 27, 10, 3]),
        (56, [0, 27, 27, 10, 10, 3]),  # three requests of 28 rows do not fit, of 11 they do
        (40, [0, 27, 10, 10, 3, 3]),
        (12, [0, 10, 3, 3, 0, 0]),
        (5, [0, 3, 0, 0, 0, 0]),
    ],
)
def test_width_is_the_widest_that_fits_and_was_asked_for(budget, expected):
    assert within_budget([0, 27, 27, 27, 10, 3], [3, 10, 27], budget) == expected


def test_the_latest_requests_go_without_their_blocks():
    running = [with_block(8), with_block(8), with_block(4), with_block(8)]
    leave_out_blocks(running, budget=24, num_prefill_tokens=3)
    assert [len(request.spec_token_ids) for request in running] == [7, 7, 3, 0]


def test_all_blocks_stay_where_they_fit():
    running = [with_block(8)] * 3
    leave_out_blocks(running, budget=24, num_prefill_tokens=0)
    assert [len(request.spec_token_ids) for request in running] == [7] * 3


@pytest.mark.parametrize(
    ("waiting", "num_seats", "num_free_slots", "longest_chunk", "expected"),
    [
        ([], 4, 1000, 200, 29),  # what is missing of the running prompt, its root row aside
        ([40, 50], 4, 1000, 200, 119),
        ([40, 50], 1, 1000, 200, 69),  # no seat for the second one
        ([40, 50], 4, 60, 200, 69),  # no KV cache for it
        ([40, 500], 4, 1000, 200, 200),
        ([40, 500], 4, 1000, 25, 74),  # prompts come in chunks
    ],
)
def test_prefill_is_counted_as_plain_vllm_would_do_it(
    waiting, num_seats, num_free_slots, longest_chunk, expected
):
    running = [FakeRequest(), FakeRequest(num_tokens=50, num_computed_tokens=20)]
    new = [FakeRequest(num_tokens=length, num_computed_tokens=0) for length in waiting]
    found = prefill_tokens(running, new, 200, num_seats, num_free_slots, longest_chunk)
    assert found == expected

"""The ladder: table as vLLM reads it, file round trip, refusals."""

import json

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from bita_vllm.ladder import LADDER_FILE, Ladder, LadderError
from bita_vllm.tree import Template

CHAIN = Template.from_widths([1], 1)  # 4 rows
WIDE = Template.from_widths([2, 1], 2)  # 12 rows
TEMPLATES = {3: CHAIN, 11: WIDE}


@pytest.mark.parametrize(
    "ranges",
    [
        [(1, 1, 11)],
        [(1, 2, 11), (3, 8, 3), (9, 9, 0)],
        [(1, 2, 3), (5, 6, 0), (9, 20, 11)],
        [(1, 64, 11), (65, 70, 3)],
    ],
)
@pytest.mark.parametrize("max_batch_size", [1, 7, 64])
def test_width_by_batch_size_is_vllms(ranges, max_batch_size):
    ladder = Ladder(TEMPLATES, ranges)
    expected = build_dynamic_sd_schedule_lookup(ranges, max_batch_size, 11)
    assert ladder.lookup(max_batch_size).tolist() == expected


def test_a_saved_ladder_is_read_back(tmp_path):
    ladder = Ladder(TEMPLATES, [(1, 2, 11), (3, 8, 3), (9, 9, 0)], {"device": "a machine"})
    ladder.save(tmp_path / LADDER_FILE)
    for path in (tmp_path, tmp_path / LADDER_FILE):
        again = Ladder.load(path)
        assert again.batch_sizes == ladder.batch_sizes
        assert again.provenance == {"device": "a machine"}
        assert {w: t.to_dict() for w, t in again.templates.items()} == {
            w: t.to_dict() for w, t in TEMPLATES.items()
        }
    assert [path.name for path in tmp_path.iterdir()] == [LADDER_FILE]
    assert again.widest.num_rows == 12
    assert again.describe() == "1-2: 12 rows, 3-8: 4 rows, 9-up: plain"


def test_a_fixed_template_is_a_ladder_of_one():
    assert Ladder.fixed(CHAIN).lookup(5).tolist() == [0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("templates", "ranges", "message"),
    [
        ({}, [(1, 1, 0)], "at least one template"),
        ({4: CHAIN}, [(1, 1, 4)], "width is its rows less the root, 3"),
        (TEMPLATES, [], "start at 1"),
        (TEMPLATES, [(2, 4, 3)], "start at 1"),
        (TEMPLATES, [(1, 4, 3), (4, 5, 0)], "do not overlap"),
        (TEMPLATES, [(1, 4, 3), (7, 6, 0)], "do not overlap"),
        (TEMPLATES, [(1, 4, -1)], "expected"),
        (TEMPLATES, [(1, 4, 5)], "width 5, but there are templates of width 3, 11 only"),
    ],
)
def test_what_cannot_be_is_refused(templates, ranges, message):
    with pytest.raises(LadderError, match=message):
        Ladder(templates, ranges)


def test_mask_groups_must_fit_the_adapter():
    Ladder(TEMPLATES, [(1, 1, 3)]).check(2)
    with pytest.raises(LadderError, match="2 rows, but the adapter has 1 mask tokens"):
        Ladder(TEMPLATES, [(1, 1, 3)]).check(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bita_ladder": 2}, "has format 2"),
        ({"batch_sizes": [[1, 2]]}, "cannot be read"),
        ({"batch_sizes": [[1, 2, 3.5]]}, "whole numbers"),
        ({"templates": [{"nodes": [[4, 0]], "groups": {"0": 1}}]}, "node 1 has parent 4"),
        ({"templates": [CHAIN.to_dict()] * 2}, "two templates of one width"),
        ({"templates": 3}, "cannot be read"),
        ({"choices": {"3": {"templates": []}}}, "cannot be read"),
        ({"choices": {"3": {"gain": 1, "templates": []}}}, "has 0 templates"),
        ({"choices": {"9": {"gain": 1, "templates": [CHAIN.to_dict()]}}}, "under width 9 begins"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    path = tmp_path / LADDER_FILE
    Ladder(TEMPLATES, [(1, 1, 3)]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LadderError, match=message):
        Ladder.load(path)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(LadderError, match="cannot be read"):
        Ladder.load(tmp_path)
    (tmp_path / LADDER_FILE).write_text("{")
    with pytest.raises(LadderError, match="make it again with 'bita tune'"):
        Ladder.load(tmp_path)

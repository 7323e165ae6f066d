"""The ladder: table as vLLM reads it, file round trip, refusals."""

import json

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder, LadderError
from bita_vllm.tree.template_set import TemplateSet

CHAIN = Template.from_widths([1], 1)  # 4 rows
WIDE = Template.from_widths([2, 1], 2)  # 12 rows
LOOSE_NODE = {"gain": 1, "templates": [{"nodes": [[4, 0]], "groups": {"0": 1}}]}
SETS = TemplateSet((WIDE, CHAIN), 1.1), TemplateSet((CHAIN,))


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
    ladder = Ladder(SETS, ranges)
    expected = build_dynamic_sd_schedule_lookup(ranges, max_batch_size, 11)
    assert ladder.lookup(max_batch_size).tolist() == expected


def test_a_saved_ladder_is_read_back(tmp_path):
    ladder = Ladder(SETS, [(1, 2, 11), (3, 8, 3), (9, 9, 0)], {"device": "a machine"})
    ladder.save(tmp_path / LADDER_FILE)
    for path in (tmp_path, tmp_path / LADDER_FILE):
        again = Ladder.load(path)
        assert again.batch_sizes == ladder.batch_sizes
        assert again.provenance == {"device": "a machine"}
        assert [one.to_dict() for one in again.template_sets] == [
            one.to_dict() for one in reversed(SETS)
        ]
    assert again.widths == [3, 11]
    assert [path.name for path in tmp_path.iterdir()] == [LADDER_FILE]
    assert again.widest.num_rows == 12
    assert again.describe() == "1-2: 12 rows, 3-8: 4 rows, 9-up: plain"


def test_a_fixed_template_is_a_ladder_of_one():
    assert Ladder.fixed(CHAIN).lookup(5).tolist() == [0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("sets", "ranges", "message"),
    [
        ((), [(1, 1, 0)], "at least one template"),
        ((*SETS, SETS[1]), [(1, 1, 3)], "two template sets begin with 4 rows"),
        (SETS, [], "start at 1"),
        (SETS, [(2, 4, 3)], "start at 1"),
        (SETS, [(1, 4, 3), (4, 5, 0)], "do not overlap"),
        (SETS, [(1, 4, 3), (7, 6, 0)], "do not overlap"),
        (SETS, [(1, 4, -1)], "expected"),
        (SETS, [(1, 4, 5)], "width 5, but there are templates of width 3, 11 only"),
    ],
)
def test_what_cannot_be_is_refused(sets, ranges, message):
    with pytest.raises(LadderError, match=message):
        Ladder(sets, ranges)


def test_mask_groups_must_fit_the_adapter():
    Ladder(SETS, [(1, 1, 3)]).check(2)
    with pytest.raises(LadderError, match="2 rows, but the adapter has 1 mask tokens"):
        Ladder(SETS, [(1, 1, 3)]).check(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bita_ladder": 1}, "has format 1"),
        ({"batch_sizes": [[1, 2]]}, "cannot be read"),
        ({"batch_sizes": [[1, 2, 3.5]]}, "to be a whole number, but it is 3.5"),
        ({"template_sets": [LOOSE_NODE]}, "node 1 has parent 4"),
        ({"template_sets": [SETS[0].to_dict()] * 2}, "begin with 12 rows"),
        ({"template_sets": 3}, "cannot be read"),
        ({"template_sets": [{"templates": []}]}, "cannot be read"),
        ({"template_sets": [{"gain": 1, "templates": []}]}, "has 0 templates"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    path = tmp_path / LADDER_FILE
    Ladder(SETS, [(1, 1, 3)]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LadderError, match=message):
        Ladder.load(path)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(LadderError, match="cannot be read"):
        Ladder.load(tmp_path)
    (tmp_path / LADDER_FILE).write_text("{")
    with pytest.raises(LadderError, match="make it again with 'bita tune'"):
        Ladder.load(tmp_path)

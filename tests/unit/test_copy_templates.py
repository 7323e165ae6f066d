"""Templates that copy, within the row budgets of a ladder's sets."""

import pytest
from tree_tools import sets_of_one

from bita_vllm.tree import Template
from bita_vllm.tree.copy_templates import MAX_COPIES, chains_within, copies_alone, with_copies
from bita_vllm.tree.search import acceptance_table, best_template
from bita_vllm.tree.template_set import MAX_TEMPLATES, TemplateSet

ACCEPTANCE = acceptance_table(None, 3)


@pytest.mark.parametrize(
    ("num_rows", "lengths"),
    [
        (2, [1]),
        (3, [2]),
        (5, [2, 3, 4]),
        (8, [2, 3, 4, 5, 6, 7]),
        (12, [3, 5, 7, 9, 11]),
        (52, [3, 7, 11, 15]),
    ],
)
def test_chains_fit_beside_the_root(num_rows, lengths):
    assert chains_within(num_rows) == lengths


def test_a_chain_takes_the_place_of_masks_within_the_row_budget():
    sets = [TemplateSet((best_template(n, 3),), gain=1.1) for n in (3, 5, 8, 24)]
    for one, copying in zip(sets, with_copies(sets, ACCEPTANCE), strict=True):
        assert copying.templates[0] is one.first and copying.gain == one.gain
        rows = one.first.num_rows
        added = copying.templates[1:]
        assert [t.num_copies for t in added] == chains_within(rows)
        assert all(t.num_rows <= rows for t in added)
        for template in added:
            beside = rows - template.num_copies
            if beside >= 3:
                assert template.restrict(0).group_length[0] > 0
                assert template.mask_depth == best_template(beside, 3).mask_depth
            else:
                assert template.num_rows == rows and template.mask_depth == 0


def test_templates_of_a_set_stay():
    sets = sets_of_one([Template.from_widths([5, 4, 3], 3)])
    assert with_copies(sets, ACCEPTANCE)[0].templates[0] is sets[0].first


def test_a_set_keeps_copies_of_its_own_and_never_grows_too_large():
    (copying,) = with_copies([TemplateSet((best_template(8, 3),))], ACCEPTANCE)
    assert with_copies([copying], ACCEPTANCE)[0].templates == copying.templates
    large = TemplateSet((best_template(16, 3),) + (best_template(12, 3),) * (MAX_TEMPLATES - 3))
    assert len(with_copies([large], ACCEPTANCE)[0].templates) == MAX_TEMPLATES
    full = TemplateSet((best_template(16, 3),) * MAX_TEMPLATES)
    assert with_copies([full], ACCEPTANCE)[0].templates == full.templates


def test_copies_alone_have_no_masks():
    two, many = copies_alone([2, 64])
    assert [t.to_dict() for t in two.templates] == [{"nodes": [], "groups": {}, "copies": 1}]
    assert [t.num_copies for t in many.templates] == list(range(MAX_COPIES, 0, -1))
    assert many.first.num_masks == 0 and many.mask_depth == 0

"""Templates that ask something of the walk each, for the tests that hold it to the naive decoder."""

from naive_decoder import Template as NaiveTemplate

from bita_vllm.tree import Template

TEMPLATES = {
    "widths 5,4,3": Template.from_widths([5, 4, 3], 3),
    "no group under most nodes": Template.build(
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (4, 0)], {0: 3, 2: 2}
    ),
    "short groups deep down": Template.build(
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 2)],
        {0: 3, 1: 2, 2: 3, 3: 1, 4: 1, 6: 2},
    ),
    "one node": Template.build([(0, 0)], {0: 1}),
}


def naive(template: Template) -> NaiveTemplate:
    """The template as the naive decoder reads it."""
    return NaiveTemplate(
        parent=template.parent.tolist(),
        is_mask=(template.mask_index >= 0).tolist(),
        mask_index=template.mask_index.tolist(),
        rank=template.rank.tolist(),
    )

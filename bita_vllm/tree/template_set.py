"""Template sets: trees of one row budget, of which every block takes the one that suits it (NumPy only).

Where the masks are sure of themselves a deep, narrow tree is worth most, where they are not a broad one
(the idea of EAGLE-2, arXiv 2406.16858, with shapes that are known beforehand, as CUDA graphs want it).
`choice.py` chooses while serving, `training/set_search.py` finds the trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bita_vllm.system.file_schemas import AcceptanceSchema, TemplateSetSchema, check
from bita_vllm.tree.search import best_template
from bita_vllm.tree.template import Template, TemplateError

MAX_TEMPLATES = 16


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """Templates that a step may use side by side.

    Attributes:
        templates: the first has the most rows and stands alone where no choice is made.
        gain: accepted length with the choice over that with the first alone, as measured.
    """

    templates: tuple[Template, ...]
    gain: float = 1.0

    def __post_init__(self) -> None:
        """Raises TemplateError."""
        if not 1 <= len(self.templates) <= MAX_TEMPLATES:
            raise TemplateError(
                f"A template set has {len(self.templates)} templates; 1 to {MAX_TEMPLATES} are supported."
            )
        most = max(template.num_rows for template in self.templates)
        if most > self.first.num_rows:
            raise TemplateError(
                f"A template set's first template has {self.first.num_rows} rows and another one {most}; "
                "the first must be the largest."
            )
        if not 0.5 < self.gain < 2:
            raise TemplateError(
                f"A template set's gain is {self.gain}; expected a ratio of accepted lengths near 1."
            )

    @property
    def first(self) -> Template:
        """The template where no choice is made."""
        return self.templates[0]

    @property
    def has_choice(self) -> bool:
        """Whether there is more than one template."""
        return len(self.templates) > 1

    @property
    def max_depth(self) -> int:
        """Deepest draft node of all templates."""
        return max(template.max_depth for template in self.templates)

    @property
    def mask_depth(self) -> int:
        """Deepest draft node of all templates that masks fill."""
        return max(template.mask_depth for template in self.templates)

    @property
    def max_rank(self) -> int:
        """Candidates needed of one mask row."""
        return max(template.max_rank for template in self.templates)

    @property
    def num_masks(self) -> int:
        """Length of the longest mask group of all templates."""
        return max(template.num_masks for template in self.templates)

    @classmethod
    def of_schema(cls, form: TemplateSetSchema) -> TemplateSet:
        """From the checked JSON form. Raises TemplateError."""
        return cls(tuple(map(Template.of_schema, form.templates)), form.gain)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "gain": round(self.gain, 4),
            "templates": [template.to_dict() for template in self.templates],
        }

    def describe(self) -> str:
        """For logs."""
        more = len(self.templates) - 1
        return self.first.describe() + (f"; or one of {more} other trees" if more else "")


def templates_of(sets: Iterable[TemplateSet]) -> tuple[Template, ...]:
    """All templates, set after set: the order of a `TemplateTable` of sets."""
    return tuple(template for one in sets for template in one.templates)


def saved_sets(acceptance: Mapping[str, Any] | None) -> dict[int, TemplateSet]:
    """By row budget: the sets that came with an adapter's acceptance statistics.

    Raises TemplateError if they are malformed.
    """
    try:
        entries = check(AcceptanceSchema, acceptance or {}).template_sets
        return {int(rows): TemplateSet.of_schema(entry) for rows, entry in entries.items()}
    except ValueError as error:
        raise TemplateError(
            f"The adapter's template sets cannot be read ({error}); run 'bita eval' to make them."
        ) from None


def set_within(num_rows: int, num_masks: int, acceptance: Mapping[str, Any] | None) -> TemplateSet:
    """The trees that 'bita eval' found for a row budget; the best template alone if it found none.

    `acceptance`: the adapter's statistics. Raises TemplateError.
    """
    saved = saved_sets(acceptance).get(num_rows)
    if saved is not None:
        return saved
    return TemplateSet((best_template(num_rows, num_masks, acceptance),))

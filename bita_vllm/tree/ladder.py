"""The ladder: which template set a step uses, by how many requests are in the batch (NumPy only).

Rows cost, and the more requests share a step the more they cost; so few requests get large step
blocks, many get small ones, and at width 0 a step is plain vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bita_vllm.system.atomic_write import write_text
from bita_vllm.system.errors import UserError
from bita_vllm.system.file_schemas import LadderSchema, beyond_masks, check, read_json, shortened
from bita_vllm.tree.template import Template, TemplateError, TemplateTable
from bita_vllm.tree.template_set import TemplateSet, templates_of

LADDER_FILE = "ladder.json"  # next to the adapter's config
FORMAT_VERSION = 2
PLAIN_WIDTH = 0


class LadderError(UserError):
    """A ladder that cannot be used; the message is one sentence for the user."""


class LadderVersionError(LadderError):
    """A ladder file of another format version."""


@dataclass(frozen=True, eq=False)
class Ladder:
    """Template sets, and the table from batch size to width.

    A width counts draft tokens as vLLM does: R-1, the rows of a set's first template less the root. Width 0 is
    plain decoding and has no template.

    Attributes:
        template_sets: at least one, of different widths; kept by width, ascending. More than the table names are
            allowed.
        batch_sizes: (first, last, width) of each range of batch sizes, both ends included, ascending;
            as vLLM's `num_speculative_tokens_per_batch_size` (vllm/v1/spec_decode/dynamic/utils.py):
            the first range starts at 1; a gap, and what comes after the last range, takes the width
            of the range before it.
        provenance: where cost and acceptance were measured; kept as it is.
    """

    template_sets: Sequence[TemplateSet]
    batch_sizes: Sequence[tuple[int, int, int]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises LadderError."""
        if not self.template_sets:
            raise LadderError(
                "A ladder needs at least one template; make one with 'bita tune', or serve without bita."
            )
        by_width = sorted(self.template_sets, key=lambda one: one.first.num_rows)
        object.__setattr__(self, "template_sets", tuple(by_width))
        if repeated := {a for a, b in pairwise(self.widths) if a == b}:
            raise LadderError(
                f"Ladder: two template sets begin with {min(repeated) + 1} rows, but a step's rows must tell its set; "
                "leave one out."
            )
        _check_ranges(self.batch_sizes)
        for first, last, width in self.batch_sizes:
            if width != PLAIN_WIDTH and width not in self.widths:
                raise LadderError(
                    f"Ladder: batch sizes {first} to {last} ask for width {width}, but there are templates of "
                    f"width {', '.join(map(str, self.widths))} only; use one of them, or 0 for plain decoding."
                )

    @classmethod
    def fixed(cls, chosen: Template | TemplateSet) -> Ladder:
        """One template, or the trees of one set, for every batch size."""
        one = chosen if isinstance(chosen, TemplateSet) else TemplateSet((chosen,))
        return cls([one], [(1, 1, one.first.width)])

    @classmethod
    def load(cls, path: str | Path) -> Ladder:
        """Read what `save` wrote; from `path` itself, or from its `ladder.json` if it is a directory.

        Raises LadderError.
        """
        path = Path(path)
        if path.is_dir():
            path = path / LADDER_FILE
        try:
            content = read_json(path)
            if not isinstance(content, dict):
                raise LadderError(
                    f"Ladder file {path} must hold a JSON object, but holds {shortened(repr(content))}."
                )
            version = content["bita_ladder"]
            if version == FORMAT_VERSION:
                form = check(LadderSchema, content)
                sets = [TemplateSet.of_schema(entry) for entry in form.template_sets]
        except LadderError:
            raise
        except TemplateError as error:
            raise LadderError(f"Ladder file {path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LadderError(
                f"Ladder file {path} cannot be read ({type(error).__name__}: {error}); make it again with 'bita tune'."
            ) from None
        if version != FORMAT_VERSION:
            raise LadderVersionError(
                f"Ladder file {path} has format {shortened(repr(version))}, but this bita reads format "
                f"{FORMAT_VERSION}; make it again with 'bita tune'."
            )
        return cls(sets, form.batch_sizes, dict(content.get("provenance", {})))

    def save(self, path: str | Path) -> None:
        """Write the JSON form, whole. Raises LadderError."""
        path = Path(path)
        content = {
            "bita_ladder": FORMAT_VERSION,
            "batch_sizes": [list(entry) for entry in self.batch_sizes],
            "template_sets": [one.to_dict() for one in self.template_sets],
            "provenance": dict(self.provenance),
        }
        try:
            write_text(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise LadderError(f"The ladder could not be written to {path} ({error}).") from error

    def check(self, num_masks: int) -> None:
        """Raise LadderError unless an adapter with k = `num_masks` can serve every template."""
        longest = max(one.num_masks for one in self.template_sets)
        deepest = max(one.mask_depth for one in self.template_sets)
        if beyond := beyond_masks(longest, deepest, num_masks):
            raise LadderError(
                f"The ladder has {beyond}; make a ladder for this adapter with 'bita tune'."
            )

    @cached_property
    def widths(self) -> list[int]:
        """Width of each template set, ascending."""
        return [one.first.width for one in self.template_sets]

    @cached_property
    def table(self) -> TemplateTable:
        """Every block that a request may have, set after set."""
        return TemplateTable(*templates_of(self.template_sets))

    @property
    def is_fixed(self) -> bool:
        """Whether every batch size has the same width."""
        return len({width for _, _, width in self.batch_sizes}) == 1

    @property
    def widest(self) -> Template:
        """The largest template: what memory and token budgets are sized for."""
        return self.template_sets[-1].first

    def lookup(self, max_batch_size: int) -> np.ndarray:
        """`[max_batch_size + 1]` int32, width by batch size; entry 0 stands for no request."""
        table = np.full(max_batch_size + 1, PLAIN_WIDTH, dtype=np.int32)
        for first, _, width in self.batch_sizes:  # each range carries on until the next one
            table[first:] = width
        return table

    def describe(self) -> str:
        """For logs: rows by batch size, or the template set if it is the only one."""
        only = len(self.template_sets) == len(self.batch_sizes) == 1
        if only and self.batch_sizes[0][2] != PLAIN_WIDTH:
            return self.template_sets[0].describe()
        return describe_ranges(self.batch_sizes)


def ranges_of(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """`Ladder.batch_sizes` from the width of each batch size from 1 up."""
    ranges: list[tuple[int, int, int]] = []
    for n, width in enumerate(widths, start=1):
        if ranges and ranges[-1][2] == width:
            ranges[-1] = (ranges[-1][0], n, width)
        else:
            ranges.append((n, n, width))
    return ranges


def describe_ranges(ranges: Sequence[tuple[int, int, int]]) -> str:
    """For logs: rows by batch size."""
    ends = [str(first - 1) for first, _, _ in ranges[1:]] + ["up"]
    return ", ".join(
        f"{first}-{end}: {width + 1} rows" if width else f"{first}-{end}: plain"
        for (first, _, width), end in zip(ranges, ends, strict=True)
    )


def _check_ranges(ranges: Sequence[tuple[int, int, int]]) -> None:
    """Raise LadderError unless ranges start at 1, ascend and do not overlap."""
    expected = "expected [first, last, width] entries that ascend, do not overlap and start at 1"
    if not ranges or ranges[0][0] != 1:
        raise LadderError(
            f"Ladder: its batch sizes are {shortened(str(list(map(list, ranges))))}; {expected}."
        )
    end = 0
    for first, last, width in ranges:
        if first <= end or last < first or width < 0:
            raise LadderError(
                f"Ladder: the range of batch sizes {[first, last, width]} comes after {end}; {expected}."
            )
        end = last

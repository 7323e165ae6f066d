"""Schemas of the files that may come from elsewhere: adapter, low-rank deltas, ladder, template.

Types, finiteness, ranges and sizes are checked before anything is built, so that no file can take the machine's
memory or end in a traceback. What the parts mean to each other is checked where they are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from bita_vllm.system.errors import UserError

MAX_ROWS = 256  # of a step block
MAX_MASK_TOKENS = 16
MAX_RANKS = 256  # candidates of a mask
MAX_FILE_BYTES = 2**24

Row = Annotated[int, Field(ge=0, lt=MAX_ROWS)]
Node = Annotated[
    tuple[Row, Annotated[int, Field(ge=0, lt=MAX_RANKS)]],  # parent, rank
    Field(strict=False),  # JSON has lists
]
RowName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}$")]  # JSON's keys are strings
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
# first and last batch size, width
Range = Annotated[tuple[BatchSize, BatchSize, Row], Field(strict=False)]
# requests, rows a request, seconds, spread (0 in ladders of before it was known)
StepSeconds = Annotated[
    tuple[BatchSize, float, float, Annotated[float, Field(ge=0)]],
    Field(strict=False),
    BeforeValidator(lambda point: [*point, 0.0] if is_list_of(point, 3) else point),
]
Probability = Annotated[float, Field(ge=0, le=1)]
RankProbabilities = Annotated[list[Probability], Field(max_length=MAX_RANKS)]
ByMask = Annotated[list[RankProbabilities], Field(max_length=MAX_MASK_TOKENS)]


def is_list_of(content: Any, length: int) -> bool:
    """Whether it is a list of so many."""
    return isinstance(content, list) and len(content) == length


class SchemaError(UserError):
    """Content that a schema refuses; the message names field, value and what was expected."""


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TemplateSchema(_Schema):
    """A tree template."""

    nodes: list[Node] = Field(max_length=MAX_ROWS)
    groups: dict[RowName, Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)]] = Field(
        max_length=MAX_ROWS
    )
    copies: Annotated[int, Field(ge=0, lt=MAX_ROWS)] = 0

    @property
    def longest_group(self) -> int:
        """Rows of the longest mask group."""
        return max(self.groups.values(), default=0)

    @property
    def mask_depth(self) -> int:
        """Deepest draft node that masks fill; nodes whose parent does not come before them count as the root."""
        depths = [0]
        for parent, _ in self.nodes:
            depths.append(depths[parent] + 1 if 0 <= parent < len(depths) else 0)
        return max(depths)


def beyond_masks(longest_group: int, mask_depth: int, num_masks: int) -> str | None:
    """What of a tree is beyond an adapter's masks, as what follows 'the tree has'; None if they reach all of it."""
    if longest_group > num_masks:
        return f"a mask group of {longest_group} rows, but the adapter has {num_masks} mask tokens"
    if mask_depth > num_masks:
        return (
            f"draft nodes at depth {mask_depth}, but the adapter's {num_masks} mask tokens predict no further than as "
            "many tokens"
        )
    return None


class TemplateSetSchema(_Schema):
    """Templates of one row budget."""

    templates: list[TemplateSchema] = Field(max_length=16)
    gain: float


class LadderProvenanceSchema(_Schema):
    """What of a ladder's provenance is read again."""

    device: str | None = None
    most_rows: float | None = Field(default=None, ge=0)
    acceptance_reached: float | None = Field(default=None, ge=0, le=1 << 10)
    step_seconds: list[StepSeconds] | None = Field(default=None, max_length=10_000)


class LadderSchema(_Schema):
    """A ladder file."""

    template_sets: list[TemplateSetSchema] = Field(max_length=MAX_ROWS)
    batch_sizes: list[Range] = Field(max_length=10_000)
    provenance: LadderProvenanceSchema = LadderProvenanceSchema()


class AcceptanceSchema(_Schema):
    """An adapter's acceptance statistics, as far as serving reads them."""

    rank_probability: ByMask = []
    # by age of the candidates, and by whether the parent was a mask's first candidate
    conditional_rank_probability: list[list[ByMask]] | None = Field(default=None, max_length=16)
    template_sets: dict[RowName, TemplateSetSchema] = Field(default={}, max_length=MAX_ROWS)


class LoraSchema(_Schema):
    """PEFT's adapter_config.json, as far as it is read."""

    r: int = Field(ge=1, le=4096)
    lora_alpha: float
    target_modules: list[str] | str | None = None


_Model = TypeVar("_Model", bound=_Schema)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, or ValueError with one line that says why not."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_FILE_BYTES} are expected")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def check(schema: type[_Model], content: Any) -> _Model:
    """Return the content as the schema's object. Raises SchemaError."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise SchemaError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    # Names in it may be the file's own.
    field = ".".join(map(str, problem["loc"])) or "the content"
    field = shortened(field if field.isprintable() else repr(field), 120)
    value = "missing" if problem["type"] == "missing" else shortened(repr(problem["input"]))
    return f"it needs {field} to be {_expected(problem)}, but it is {value}"


def shortened(text: str, most: int = 60) -> str:
    """Return the text, cut to so many characters, for messages about what a file holds."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _expected(problem: Any) -> str:
    bounds = problem.get("ctx", {})
    for name, words in (
        ("ge", "at least"),
        ("gt", "more than"),
        ("le", "at most"),
        ("lt", "below"),
    ):
        if name in bounds:
            kind = "a whole number" if isinstance(problem["input"], int) else "a number"
            return f"{kind}, {words} {bounds[name]}"
    return {
        "missing": "there",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a number",
        "too_long": f"at most {bounds.get('max_length')} long",
        "dict_type": "an object",
        "model_type": "an object",
        "list_type": "a list",
        "tuple_type": "a list",
        "string_type": "a text",
    }.get(problem["type"], problem["msg"])

"""Rows of blocks where no adapter is named, and copies of text already seen are all that drafts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bita_vllm.scheduling.default_rows import Machine, row_share
from bita_vllm.scheduling.row_options import AUTO
from bita_vllm.step.settings import ConfigError
from bita_vllm.tree.copy_templates import MAX_COPIES, copies_alone
from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder

# The most copies of a block, by number of requests: a row costs more of a token the more requests there are
# (`tree/chain_choice.py`), and steps without any drafts are plain vLLM's.
BATCH_SIZES = ((1, 1, 7), (2, 4, 3), (5, 8, 1), (9, 9, PLAIN_WIDTH))


def copy_ladder(options: Mapping[str, Any], machine: Machine) -> tuple[Ladder, float]:
    """The ladder of a run without an adapter, and what a row costs there of a step of one row.

    By rule a copied token must be worth its row; with a number of the user's, rows cost nothing.

    Args:
        options: the user's.
        machine: that serves them, a CPU.

    Raises:
        ConfigError: an option has no meaning without an adapter, or a wrong value.
    """
    for name, what in (("tree", "trees"), ("ladder", "ladders")):
        if options.get(name) not in (None, AUTO):
            raise ConfigError(
                f"Speculative option {name!r} is {options[name]!r}, but {what} are made for an adapter's masks and no "
                f"adapter is named; name one as 'model', or leave {name!r} out."
            )
    if options.get("copies") is False:
        raise ConfigError(
            "Speculative option 'copies' is false, but without an adapter nothing else drafts; leave it out, or name "
            "an adapter as 'model'."
        )
    most = options.get("num_speculative_tokens")
    if most in (None, AUTO):
        fitting = [
            (first, last, min(width, max(machine.max_block - 1, 1)))
            for first, last, width in BATCH_SIZES
        ]
        return _ladder(fitting), row_share(machine)
    if type(most) is not int or not 1 <= most <= MAX_COPIES:
        raise ConfigError(
            f"num_speculative_tokens is {most!r}; without an adapter it is 'auto' or the most copied tokens of a "
            f"block, a whole number from 1 to {MAX_COPIES}."
        )
    return _ladder([(1, 1, most)]), 0.0


def _ladder(batch_sizes: list[tuple[int, int, int]]) -> Ladder:
    widths = {width for *_, width in batch_sizes} - {PLAIN_WIDTH}
    return Ladder(copies_alone(width + 1 for width in widths), batch_sizes)

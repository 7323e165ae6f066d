"""Which step blocks a run uses: the user's options about rows, the ladder next to the adapter, rows by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.step.settings import ConfigError
from bita_vllm.tree import MAX_ROWS, Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder
from bita_vllm.tree.template_set import TemplateSet, set_within

logger = init_logger("vllm.bita")

AUTO = "auto"


def choose_ladder(
    options: Mapping[str, Any],
    adapter: AdapterConfig,
    device: str,
    default: Callable[[], Ladder | None],
) -> tuple[str, Ladder]:
    """The tree as given, and the ladder: given, the adapter's own, by rule, or one template for every batch size.

    Args:
        options: the user's.
        adapter: whose trees they are.
        device: name of the machine.
        default: makes the ladder for a run that asks for nothing; None where there is none: then blocks have the
            adapter's row budget.

    Raises:
        ValueError: ConfigError, LadderError or TemplateError.
    """
    given = options.get("ladder")
    budget, tree = options.get("num_speculative_tokens", AUTO), options.get("tree", AUTO)
    fixed = budget not in (AUTO, None) or tree != AUTO
    if given is not None and fixed:
        raise ConfigError(
            f"Speculative option 'ladder' is {given!r}, which has a step block for every batch size, but "
            "num_speculative_tokens or tree is given too; leave these out, or leave the ladder out."
        )
    if given is not None and (not isinstance(given, str) or not Path(given).exists()):
        raise ConfigError(
            f"Speculative option 'ladder' is {given!r}; expected the path of a file made by 'bita tune'."
        )
    if given is not None:
        return AUTO, _named_ladder(given, adapter, device)
    if not fixed and (ladder := _ladder_beside(adapter, device) or default()) is not None:
        return AUTO, ladder
    tree, chosen = _choose_template(options, adapter)
    return tree, Ladder.fixed(chosen)


def _named_ladder(path: str, adapter: AdapterConfig, device: str) -> Ladder:
    """The ladder, fit for the adapter; a warning if it was made on another machine."""
    ladder = Ladder.load(path)
    ladder.check(adapter.num_mask_tokens)
    made_on = ladder.provenance.get("device")
    if made_on not in (None, device):
        logger.warning(
            "bita: the ladder %s was made on another machine (%s; this is %s), where rows may cost "
            "more or less; make one here with 'bita tune'.",
            path,
            made_on,
            device,
        )
    return ladder


def _ladder_beside(adapter: AdapterConfig, device: str) -> Ladder | None:
    """The adapter's own ladder, unless it was made on another machine: what is best there may lose here."""
    path = None if adapter.path is None else adapter.path / LADDER_FILE
    if path is None or not path.is_file():
        return None
    ladder = Ladder.load(path)
    made_on = ladder.provenance.get("device")
    if made_on not in (None, device):
        logger.warning(
            "bita: the adapter's ladder, %s, was made on another machine (%s; this is %s), so it is not used; "
            "make one here with 'bita tune', or name it as 'ladder' in the speculative config.",
            path,
            made_on,
            device,
        )
        return None
    ladder.check(adapter.num_mask_tokens)
    return ladder


def _choose_template(
    options: Mapping[str, Any], adapter: AdapterConfig
) -> tuple[str, Template | TemplateSet]:
    """The tree as given, and the template: explicit, or the best within the row budget."""
    budget = options.get("num_speculative_tokens")
    budget = None if budget == AUTO else budget
    if budget is not None and (type(budget) is not int or not 2 <= budget < MAX_ROWS):
        raise ConfigError(
            f"num_speculative_tokens is {budget!r}; with method 'bita' it is 'auto' or the row budget less "
            f"one, a whole number from 2 to {MAX_ROWS - 1}."
        )
    tree = options.get("tree", AUTO)
    if type(tree) is int:  # --speculative-config.tree 4 arrives as a number
        tree = str(tree)
    if not isinstance(tree, str) or not tree.strip():
        raise ConfigError(
            f"Speculative option 'tree' is {tree!r}; expected 'auto', widths per depth such as '5,4,3', "
            "or the path of a template file."
        )
    if tree == AUTO:
        num_rows = min((budget or adapter.speculative_tokens) + 1, MAX_ROWS)
        return tree, set_within(num_rows, adapter.num_mask_tokens, adapter.acceptance)

    template = Template.from_text(tree, adapter.num_mask_tokens)
    if template is None:
        raise ConfigError(
            f"Speculative option 'tree' is {tree!r}: it is neither 'auto', nor widths per depth such as '5,4,3', "
            "nor an existing template file."
        )
    if budget is not None and budget < template.width:
        raise ConfigError(
            f"num_speculative_tokens is {budget}, but tree {tree!r} needs {template.width} "
            "(its rows less the root); raise it, leave it out, or give a smaller tree."
        )
    return tree, template

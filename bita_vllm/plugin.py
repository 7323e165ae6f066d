"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process, before its CLI.

Source: load_general_plugins (vllm/plugins/__init__.py).
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.bita")


def register() -> None:
    """Make vLLM know the method 'bita'; a second call does nothing, and no failure gets out."""
    try:
        from bita_vllm import patches

        patches.apply()
        _register_speculators_format()
    except Exception:
        logger.exception(
            "bita could not be registered; plain vLLM is unchanged, bita is not available."
        )


def _register_speculators_format() -> None:
    """Let vLLM read an adapter's config.json (vllm/transformers_utils/configs/speculators)."""
    from vllm.transformers_utils.configs.speculators.algos import (
        SUPPORTED_SPECULATORS_TYPES,
        register_speculator,
    )

    if "bita" not in SUPPORTED_SPECULATORS_TYPES:
        register_speculator("bita")(_update_config)


def _update_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """The base model's config with the adapter's architecture, for Transformers."""
    pre_trained_config["architectures"] = config_dict.get("architectures", ["BitaSpeculator"])

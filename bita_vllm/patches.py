"""The few patches on closed spots of vLLM, as a table; each spot is checked before it is used.

vLLM has no registry there. Every patch hands runs that do not ask for bita straight to vLLM's own code.

Patches are all applied or none: when a row does not hold, plain vLLM stays as it is, and a run that
asks for bita gets one sentence that names the row and the versions that work.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from bita_vllm import support
from bita_vllm.hooks import Function, Hook, Problem
from bita_vllm.hooks.check import check_installed, function_of, locate, stored_attribute

logger = logging.getLogger("vllm.bita")

CLI_ALIASES = {
    "--spec-method": "--speculative-method",
    "--spec-model": "--speculative-model",
    "--spec-tokens": "--speculative-tokens",
}

# --- The patches: each gets vLLM's own function first, then the call's arguments ------------------


def _add_cli_args(original: Function, parser: Any) -> Any:
    parser = original(parser)
    actions = parser._option_string_actions
    for name, alias in CLI_ALIASES.items():
        if name in actions and alias not in actions:
            actions[name].option_strings = [*actions[name].option_strings, alias]
            actions[alias] = actions[name]
    method = actions.get("--spec-method")
    if method is not None and method.choices and "bita" not in method.choices:
        method.choices = [*method.choices, "bita"]
    return parser


def _create_speculative_config(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    if not _asks_for_bita(self):
        return original(self, *args, **kwargs)
    from bita_vllm import config, refusals

    refusals.require_support(PATCHES)

    bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
    parallel_config = bound["target_parallel_config"]
    config.claim_engine(self, parallel_config)
    return config.build_speculative_config(
        config.merged_options(self), bound["target_model_config"], parallel_config
    )


def _create_engine_config(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(self, *args, **kwargs)
    from bita_vllm import config
    from bita_vllm.step import graphs
    from bita_vllm.step.settings import get_settings

    settings = get_settings(vllm_config)
    if settings is not None:
        config.check_engine(vllm_config, settings)
        if not graphs.user_chose_sizes(self):
            graphs.cover_widths(vllm_config)
    return vllm_config


def _build_vllm_speculative_config(original: Function, cls: Any, config_dict: Any) -> Any:
    if config_dict.get("speculators_model_type") != "bita":
        return original(cls, config_dict)
    return {"method": "bita"}


def _validate_spec_decode(original: Function, self: Any, speculative_config: Any) -> None:
    from bita_vllm.step.settings import BitaSpeculativeConfig

    if not isinstance(speculative_config, BitaSpeculativeConfig):
        original(self, speculative_config)


def _validate_model_input(
    original: Function, self: Any, prompt_input: Any, prompt_type: Any
) -> None:
    original(self, prompt_input, prompt_type)
    from bita_vllm.refusals import refuse_prompt

    if reason := refuse_prompt(self.vllm_config, prompt_input.get("prompt_token_ids") or ()):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(reason)


def _spec_decoding_prom(
    original: Function, self: Any, speculative_config: Any, *args: Any, **kwargs: Any
) -> None:
    from bita_vllm.step.settings import BitaSpeculativeConfig

    if isinstance(speculative_config, BitaSpeculativeConfig):
        speculative_config = copy.copy(speculative_config)
        speculative_config.num_speculative_tokens = speculative_config.bita.max_depth
    original(self, speculative_config, *args, **kwargs)


_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

PATCHES = (
    Hook(
        f"{_ENGINE_ARGS}.add_cli_args",
        "--speculative-method/-model/-tokens, and 'bita' as a choice of --spec-method",
        "(parser)",
        _add_cli_args,
    ),
    Hook(
        f"{_ENGINE_ARGS}.create_speculative_config",
        "SpeculativeConfig.method is a closed Literal: method 'bita' gets its own subclass",
        "(self, target_model_config, target_parallel_config)",
        _create_speculative_config,
    ),
    Hook(
        f"{_ENGINE_ARGS}.create_engine_config",
        "what bita cannot serve is refused in the frontend, on the finished config",
        "(self, usage_context=, headless=)",
        _create_engine_config,
    ),
    Hook(
        "vllm.transformers_utils.configs.speculators.base:"
        "SpeculatorsConfig.build_vllm_speculative_config",
        "`vllm serve ADAPTER_DIR`: the adapter's row budget is a default, not the user's wish",
        "(cls, config_dict)",
        _build_vllm_speculative_config,
    ),
    Hook(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "min_p and logit_bias work with bita",
        "(self, speculative_config)",
        _validate_spec_decode,
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor._validate_model_input",
        "ids beyond the vocabulary are mask tokens: no prompt may hold them",
        "(self, prompt_input, prompt_type)",
        _validate_model_input,
    ),
    Hook(
        "vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
        "accepted tokens are counted by tree depth: no series for rows",
        "(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion=)",
        _spec_decoding_prom,
    ),
)


# --- Apply and undo -----------------------------------------------------------------------------

_APPLIED: dict[str, Function] = {}  # the ledger: target -> original function
_UNDO: list[Callable[[], None]] = []


def apply() -> list[Problem]:
    """Apply every patch once; if a row does not hold, only what refuses bita in one sentence."""
    if _APPLIED:
        return []
    problems = check_installed(PATCHES)
    usable = not problems and support.is_supported(support.vllm_version())
    for problem in problems:
        logger.warning("bita: %s (%s); plain vLLM is unchanged.", problem, problem.hook.why)
    for hook in PATCHES if usable else PATCHES[:2]:
        try:
            _apply(hook)
        except (ImportError, AttributeError, KeyError):
            continue  # already logged as missing
    return problems


def undo() -> None:
    """Put every original back."""
    while _UNDO:
        _UNDO.pop()()
    _APPLIED.clear()


def _asks_for_bita(args: Any) -> bool:
    options = getattr(args, "speculative_config", None)
    asked = options.get("method") if isinstance(options, dict) else None
    return "bita" in (asked, getattr(args, "spec_method", None))


def _apply(hook: Hook) -> None:
    owner, name = locate(hook.target)
    stored = stored_attribute(owner, name)
    new = _patched(function_of(stored), hook.patch)
    if isinstance(stored, staticmethod | classmethod):
        new = type(stored)(new)
    setattr(owner, name, new)
    _UNDO.append(functools.partial(setattr, owner, name, stored))
    _APPLIED[hook.target] = function_of(stored)


def _patched(original: Function, patch: Any) -> Any:
    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return patch(original, *args, **kwargs)

    return patched

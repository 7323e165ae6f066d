"""A second form of a loaded model, for steps with blocks: deltas and mask embeddings go into it, never into the first.

So a step without mask rows runs plain vLLM's model: the same modules, the same compiled graph, no operation of ours.
The forms share weights, attention layers (whose KV cache they write) and every module that holds neither a linear
layer nor an embedding; each has a compiled graph of its own.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

# What a module of its own keeps in tables of its own.
_TABLES = "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"
COMPILE_TAG = "bita_blocks"


def plain_config(vllm_config: VllmConfig, with_packed_layers: bool) -> VllmConfig:
    """The config that the first form is built and compiled with: plain vLLM's, so its compiled graph serves both.

    With packed linear layers the graph is not plain vLLM's, and its key must not be.
    """
    config = copy.copy(vllm_config)
    speculative = vllm_config.speculative_config
    config.speculative_config = None
    if with_packed_layers:
        config.speculative_config = copy.copy(speculative)
        config.speculative_config.traces_blocks = False
    return config


def block_form(model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
    """Return the form of `model` whose linear layers and embeddings may be changed without changing `model`."""
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.cache_dir = ""  # the other form's, once it is compiled
    twins: dict[int, nn.Module] = {}
    twin = _twin(model, twins)
    _enter_in_table(twins, config.compilation_config.static_forward_context)
    with set_current_vllm_config(config), set_model_tag(COMPILE_TAG):
        for module in twins.values():
            if isinstance(module, TorchCompileWithNoGuardsWrapper):
                _compile_again(module, config)
    return twin


def _changes(module: nn.Module) -> bool:
    """Whether the module, or one in it, is of those that a form has of its own."""
    return any(
        isinstance(child, (LinearBase, VocabParallelEmbedding)) for child in module.modules()
    )


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A module with the same weights, and twins of the modules in it that change."""
    if isinstance(module, Attention) or not _changes(module):
        return module
    if id(module) in twins:
        return twins[id(module)]
    twin = copy.copy(module)
    twins[id(module)] = twin
    for name in _TABLES:
        twin.__dict__[name] = copy.copy(module.__dict__[name])
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            twin.__dict__[name] = MethodType(value.__func__, twin)
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _twin(child, twins)
    return twin


def _enter_in_table(
    # by the id of what they are twins of
    twins: dict[int, nn.Module],
    # of vLLM, by name; both forms use it
    table: dict[str, Any],
) -> None:
    """Give twins of layers that vLLM's operations look up by name, such as mixtures of experts, a name of their own."""
    for name, layer in list(table.items()):
        twin: Any = twins.get(id(layer))
        if twin is not None:
            twin.layer_name = f"{name}.{COMPILE_TAG}"
            table[twin.layer_name] = twin


def _compile_again(module: Any, config: VllmConfig) -> None:
    """Give a module that vLLM compiles a compiled graph of its own."""
    module.vllm_config = config
    module.compilation_config = config.compilation_config
    if not module.do_not_compile:
        TorchCompileWithNoGuardsWrapper.__init__(
            module, compile_prefix=module._compile_prefix, is_encoder=module._is_encoder
        )
        module._compile_tag = COMPILE_TAG

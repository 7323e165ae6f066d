"""What bita cannot serve, and why: platform, versions, models, engines and prompts. Each refusal is one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import vllm
import vllm.envs as envs
from vllm.config import ModelConfig
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from bita_vllm import hooks, support
from bita_vllm.hooks.check import check_installed, check_source
from bita_vllm.step.settings import FP8_CACHES, BitaSettings, ConfigError, get_settings
from bita_vllm.system import platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def require_support(patches: tuple[hooks.Hook, ...]) -> None:
    """Raise ConfigError unless this vLLM can run bita with these patches; called when a run asks for it."""
    works = " and ".join(f"{v}.x" for v in support.SUPPORTED_VERSIONS)
    version = support.vllm_version()
    if not support.is_supported(version):
        raise ConfigError(
            f"bita works with vLLM {works}, but this is vLLM {version}; install one of those."
        )
    problems = check_installed(patches) + check_source(Path(vllm.__file__).parent, hooks.OVERRIDES)
    if problems:
        listed = "; ".join(map(str, problems))
        raise ConfigError(
            f"bita works with vLLM {works} as released, but in this vLLM {version} {listed}; "
            "reinstall vLLM."
        )


def refuse_platform() -> str | None:
    """Why bita cannot be served in this process, whatever the model; None if it can."""
    if not (platform.on_gpu() or platform.on_cpu()):
        name = getattr(
            platform.current_platform, "device_name", None
        )  # where vLLM finds no device it has none
        return (
            "Speculative method 'bita' runs on vLLM's CUDA and CPU platforms, but this is "
            f"{repr(name) if name else 'an unknown one'}; serve without it."
        )
    if platform.on_cpu() and not platform.on_x86():
        return (
            "bita reads the KV cache layout that vLLM has on x86-64 CPUs, but this is a CPU of another kind; "
            "serve without it."
        )
    if platform.on_gpu() and envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return (
            "VLLM_USE_V2_MODEL_RUNNER=0 is set, but on a GPU bita uses vLLM's V2 model runner; "
            "unset it."
        )
    if not platform.on_gpu() and envs.VLLM_USE_V2_MODEL_RUNNER:
        return (
            "VLLM_USE_V2_MODEL_RUNNER=1 is set, but on CPU bita uses vLLM's V1 model runner; "
            "unset it."
        )
    return None


def refuse_arguments(args: EngineArgs) -> None:
    """Raise ConfigError where platform or arguments cannot be served, before vLLM makes its config of them."""
    # Here already: vLLM's own message about LoRA with drafts is about row counts.
    _refuse_first([("LoRA (enable_lora)", args.enable_lora)])
    if refusal := refuse_platform():
        raise ConfigError(refusal)


def refuse_model(model_config: ModelConfig) -> None:
    """Raise ConfigError, by name, for what of the base model cannot be served."""
    _refuse_first(_unsupported_model(model_config))


def refuse_engine(vllm_config: VllmConfig, settings: BitaSettings) -> None:
    """Raise ConfigError, by name, for what of the finished config cannot be served."""
    num_rows = settings.template.num_rows
    max_model_len = vllm_config.model_config.max_model_len
    if max_model_len <= num_rows:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but a step block of this tree has {num_rows} rows; "
            f"use at least {num_rows + 1}, or a smaller tree (num_speculative_tokens)."
        )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    if budget < num_rows:
        raise ConfigError(
            f"max_num_batched_tokens is {budget}, but a step block of this tree has {num_rows} "
            f"rows; use at least {num_rows}, or a smaller tree (num_speculative_tokens)."
        )
    _refuse_first(_unsupported_engine(vllm_config))


def _refuse_first(features: Iterable[tuple[str, bool]]) -> None:
    for feature, present in features:
        if present:
            raise ConfigError(
                f"Speculative method 'bita' does not support {feature}; "
                "serve without it, or without bita."
            )


def _unsupported_model(model: ModelConfig) -> Iterator[tuple[str, bool]]:
    """(feature as the user knows it, whether this model has it)."""
    arch = model.architecture
    yield f"pooling models (runner {model.runner_type!r})", model.runner_type != "generate"
    yield f"encoder-decoder models ({arch})", model.is_encoder_decoder
    yield f"diffusion models ({arch})", model.is_diffusion
    yield f"models with multi-axis rotary positions ({arch})", model.uses_mrope
    yield f"models without attention ({arch})", model.is_attention_free
    # A class for hybrids may hold attention layers only (Granite 4 dense): `is_hybrid` looks at the layers.
    yield f"hybrid or state-space models ({arch})", model.is_hybrid
    yield f"multi-head latent attention ({arch})", model.use_mla
    chunked = model.attention_chunk_size is not None and platform.on_gpu()
    yield f"chunked local attention ({arch}) on a GPU", chunked
    # The last of what a model is: where another refusal holds, text alone would not help.
    text_alone = "text alone works: language_model_only=True, --language-model-only"
    yield f"images and other media ({arch}; {text_alone})", model.supports_multimodal_inputs
    yield "prompt embeddings (enable_prompt_embeds)", model.enable_prompt_embeds
    yield "sampling masks (return_sampling_mask)", model.return_sampling_mask
    yield "replayed traces (enable_trace_replay)", model.enable_trace_replay
    installed = [plugin.name for plugin in entry_points(group="vllm.logits_processors")]
    custom = installed + list(model.logits_processors or ())
    # Those of the V2 runner are made for drafts; vLLM's own speculative decoding on V1 refuses them, too.
    feature = f"custom logits processors ({', '.join(map(str, custom))}) on CPU"
    reason = "as those of vLLM's V1 model runner may count steps, and a step with drafts is several"
    yield f"{feature}, {reason}", bool(custom) and not platform.on_gpu()


def _unsupported_engine(c: VllmConfig) -> Iterator[tuple[str, bool]]:
    """(feature as the user knows it, whether this engine has it)."""
    parallel = c.parallel_config
    for name in ("pipeline", "data", "prefill_context", "decode_context"):
        size = getattr(parallel, f"{name}_parallel_size")
        yield f"{name.replace('_', ' ')} parallelism ({name}_parallel_size {size})", size > 1
    # There every rank has a scheduler of its own, and their clocks would choose different widths.
    launcher = parallel.distributed_executor_backend
    feature = f"ranks that are started from outside (distributed_executor_backend {launcher!r})"
    yield feature, launcher == "external_launcher" and parallel.world_size > 1
    sharded = bool(parallel.enable_batch_sharded_sampling)
    feature = "sampling in shards of the batch (enable_batch_sharded_sampling)"
    reason = "as every rank makes the next blocks of all requests from their whole logits"
    yield f"{feature}, {reason}", sharded
    # There layers are packed, and the model has two forms, of which a transfer would renew one.
    transfer = c.weight_transfer_config is not None and not platform.on_gpu()
    feature = "weight transfer (weight_transfer_config) on CPU, where weights are renewed by reload_weights"
    yield feature, transfer
    experts = c.aux_output_config.enable_return_routed_experts
    yield "returned experts of a mixture (enable_return_routed_experts)", experts
    yield "text watermarking (watermark_config)", c.watermark_config is not None
    yield "KV connectors (kv_transfer_config)", c.kv_transfer_config is not None
    cache = c.cache_config
    quantised = is_quantized_kv_cache(cache.cache_dtype)
    served = platform.on_gpu() and cache.cache_dtype in FP8_CACHES
    place = "a GPU" if platform.on_gpu() else "CPU"
    yield f"kv_cache_dtype {cache.cache_dtype!r} on {place}", quantised and not served
    skipped = quantised and bool(cache.kv_cache_dtype_skip_layers)
    yield "a KV cache quantised in some layers only (kv_cache_dtype_skip_layers)", skipped
    shared = cache.kv_sharing_fast_prefill
    yield "fast prefill over shared KV (kv_sharing_fast_prefill)", shared


def refuse_prompt(vllm_config: VllmConfig, token_ids: Sequence[int]) -> str | None:
    """Why a prompt cannot be served with bita, or None.

    vLLM lets through what its tokenizer knows, and anything without a tokenizer; with bita, ids beyond the
    vocabulary are mask tokens.
    """
    vocab_size = vllm_config.model_config.get_vocab_size()
    if get_settings(vllm_config) is None or not token_ids:
        return None
    wrong = next((i for i in (min(token_ids), max(token_ids)) if not 0 <= i < vocab_size), None)
    if wrong is None:
        return None
    return f"The prompt holds token id {wrong}, but the model's ids are 0 to {vocab_size - 1}."

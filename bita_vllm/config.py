"""What the user asked for: options of the method, their checks, their place in vLLM's config.

The options come in as vLLM's own speculative options (`--speculative-config`, `--spec-method` ...,
Python dict, speculators format). They end up in `BitaSpeculativeConfig`, a subclass of vLLM's
`SpeculativeConfig`: it travels wherever vLLM sends its config (pickle, copy, replace), and its type
is the marker of a run that asked for bita. For vLLM's own branches it is a method without a draft
model and draft KV cache: 'custom_class' on the V1 runner, which schedules each step after the last
one, 'ngram_gpu' on the V2 runner, which does not have to (vllm/config/{speculative,vllm}.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from pydantic import InstanceOf
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config, get_field
from vllm.platforms import current_platform
from vllm.utils.hashing import safe_hash
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from bita_vllm import __version__
from bita_vllm.adapter.checkpoint import Adapter, resolve_adapter_dir
from bita_vllm.adapter.config import AdapterConfig, ModelShape
from bita_vllm.scheduling.default_rows import Machine, default_ladder
from bita_vllm.scheduling.row_options import ConfigError, choose_ladder
from bita_vllm.scheduling.token_budget import within_budget
from bita_vllm.system.machine import cpu_name
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder, ranges_of
from bita_vllm.tree.template_set import templates_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

METHOD = "bita"
CPU_WORKER_CLS = "bita_vllm.runner.cpu.BitaCPUWorker"
GPU_WORKER_CLS = "bita_vllm.runner.gpu.BitaGPUWorker"
SCHEDULER_CLS = "bita_vllm.scheduling.scheduler.BitaScheduler"
ASYNC_SCHEDULER_CLS = "bita_vllm.scheduling.scheduler.BitaAsyncScheduler"
# fp8 with one scale for all keys of a layer and one for all values: what tree attention reads on a GPU.
FP8_CACHES = ("fp8", "fp8_e4m3")
OPTIONS = ("method", "model", "num_speculative_tokens", "tree", "ladder")


@dataclass(frozen=True)
class BitaSettings:
    """Settings of one run, the same in every process.

    Attributes:
        adapter_dir: directory of the adapter checkpoint.
        tree: as the user gave it: 'auto', widths such as '5,4,3', or a template file.
        num_speculative_tokens: R-1 of the largest template, what vLLM's scheduler counts as draft tokens.
        ladder: the step blocks, and which of them a step uses; of one template unless there is a ladder.
        num_mask_tokens: k of the adapter; mask ids are V to V+k-1.
        mask_lora: rank and modules of the adapter's low-rank deltas, if it has any.
    """

    adapter_dir: str
    tree: str
    num_speculative_tokens: int
    ladder: Ladder
    num_mask_tokens: int
    mask_lora: tuple[int, tuple[str, ...]] | None = None

    @property
    def template(self) -> Template:
        """The largest template."""
        return self.ladder.widest

    @property
    def templates(self) -> tuple[Template, ...]:
        """Every template that blocks are made from, by width, each width's first one first."""
        return templates_of(self.ladder.template_sets)

    @property
    def max_depth(self) -> int:
        """Deepest draft node of all templates."""
        return max(template.max_depth for template in self.templates)


class DrafterSeat:
    """Fills vLLM's drafter seat: the runner makes the next block itself, after verification.

    Source: GPUModelRunner.load_model and propose_draft_token_ids (vllm/v1/worker).
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        del vllm_config

    def load_model(self, model: Any) -> None:
        """Nothing to load: the base model drafts."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise RuntimeError(
            "bita drafts in the base model's forward pass; its runner must not call propose()."
        )


@config
class BitaSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config for a run with bita; `bita` holds the settings."""

    bita: InstanceOf[BitaSettings] = None  # type: ignore[assignment]
    # width -> requests of a step that a FULL graph of blocks is captured for; None: at the user's own sizes
    graph_batches: dict[int, list[int]] | None = None
    packs_linear_layers: bool = False  # the CPU runner says so, before the model is compiled
    traces_blocks: bool = (
        True  # False: of the CPU runner's form of the model for steps without blocks
    )

    def __post_init__(self) -> None:
        """What vLLM does for its own method of that name, without a warning or a lookup."""
        self.method = "ngram_gpu" if on_gpu() else "custom_class"
        self.model = f"{DrafterSeat.__module__}.{DrafterSeat.__qualname__}"
        self.prompt_lookup_max = 0
        self.prompt_lookup_min = 0
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config

    def use_ngram(self) -> bool:
        return False

    def use_ngram_gpu(self) -> bool:
        return False

    def compute_hash(self) -> str:
        """The embedding of mask ids, deltas and packed layers are part of the compiled graph, so of the hash.

        How they lie in memory is this version's.
        """
        bita = self.bita
        adapter = METHOD, __version__, bita.num_mask_tokens, bita.mask_lora
        form = self.packs_linear_layers, self.traces_blocks
        factors = (super().compute_hash(), *adapter, *form)
        return safe_hash(str(factors).encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return (
            f"SpeculativeConfig(method='{METHOD}', model='{self.bita.adapter_dir}', "
            f"num_spec_tokens={self.num_speculative_tokens}, tree='{self.bita.tree}')"
        )


def get_settings(vllm_config: VllmConfig) -> BitaSettings | None:
    """The settings of this run, or None if it does not ask for bita."""
    spec = vllm_config.speculative_config
    return spec.bita if isinstance(spec, BitaSpeculativeConfig) else None


def merged_options(args: EngineArgs) -> dict[str, Any]:
    """The user's speculative options, flags and dict merged.

    Source: EngineArgs.create_speculative_config (vllm/engine/arg_utils.py); unlike there, the same
    value may be given twice, as in `vllm serve ADAPTER_DIR --spec-method bita`.
    """
    options = {
        key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()
    }
    flags = {
        "method": ("--spec-method", args.spec_method),
        "model": ("--spec-model", args.spec_model),
        "num_speculative_tokens": ("--spec-tokens", args.spec_tokens),
    }
    for key, (flag, value) in flags.items():
        if value is not None and options.setdefault(key, value) != value:
            raise ConfigError(
                f"{flag} is {value!r}, but {key!r} in the speculative config is {options[key]!r}; "
                "give it once."
            )
    return options


def build_speculative_config(
    options: Mapping[str, Any], model_config: ModelConfig, parallel_config: ParallelConfig
) -> BitaSpeculativeConfig:
    """Check the options against each other, the adapter and the base model.

    Raises:
        ValueError: ConfigError, AdapterError or TemplateError, each one sentence.
    """
    _check_option_names(options)
    _refuse_first(_unsupported_model(model_config))
    name = options.get("model")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "Speculative method 'bita' needs an adapter: give its directory or hub name as "
            f"--speculative-model ('model' in the speculative config), got {name!r}."
        )
    adapter_dir = str(resolve_adapter_dir(name))
    adapter_config = AdapterConfig.load(adapter_dir)
    shape = ModelShape.from_hf_config(model_config.hf_text_config)
    # All of it, not only its config: a bad adapter is refused before any worker starts.
    adapter = Adapter.load(adapter_dir, shape)

    def default() -> Ladder | None:
        run = model_config, parallel_config, adapter.mask_lora is not None
        return default_ladder(adapter_config, Machine.here(on_gpu()).serving(*run))

    tree, ladder = choose_ladder(options, adapter_config, device_name(), default)
    settings = BitaSettings(
        adapter_dir=adapter_dir,
        tree=tree,
        num_speculative_tokens=ladder.widest.num_rows - 1,
        ladder=ladder,
        num_mask_tokens=adapter_config.num_mask_tokens,
        mask_lora=None if adapter.mask_lora is None else adapter.mask_lora.outline,
    )
    # On the V2 runner vLLM itself follows the table and captures graphs for every width; on the V1 runner
    # its config may not have one (scheduler.py).
    always_widest = {width for *_, width in ladder.batch_sizes} == {settings.num_speculative_tokens}
    by_batch_size = list(ladder.batch_sizes) if on_gpu() and not always_widest else None
    return BitaSpeculativeConfig(
        num_speculative_tokens=settings.num_speculative_tokens,
        num_speculative_tokens_per_batch_size=by_batch_size,
        target_model_config=model_config,
        target_parallel_config=parallel_config,
        bita=settings,
    )


def _check_option_names(options: Mapping[str, Any]) -> None:
    """Refuse options that nobody knows, and vLLM's that mean nothing here when they are set."""
    engine_fills = {"target_model_config", "target_parallel_config"}
    known = {field.name for field in fields(SpeculativeConfig)} - engine_fills
    legal = ", ".join(OPTIONS)
    for key, value in options.items():
        if key in OPTIONS or key in engine_fills:
            continue
        if key not in known:
            raise ConfigError(
                f"Unknown speculative option {key!r} for method 'bita'; it takes {legal}."
            )
        if value != get_field(SpeculativeConfig, key).default:
            raise ConfigError(
                f"Speculative option {key!r} (set to {value!r}) has no meaning with method 'bita', "
                f"which takes {legal}; remove it."
            )


def on_gpu() -> bool:
    """Whether this process serves on vLLM's V2 runner: on a CUDA GPU."""
    return current_platform.is_cuda()


def device_name() -> str:
    """What steps run on here: the GPU, or the CPU."""
    return current_platform.get_device_name() if on_gpu() else cpu_name()


def refuse_platform() -> str | None:
    """Why bita cannot be served in this process, whatever the model; None if it can."""
    if not (on_gpu() or current_platform.is_cpu()):
        name = getattr(
            current_platform, "device_name", None
        )  # where vLLM finds no device it has none
        return (
            "Speculative method 'bita' runs on vLLM's CUDA and CPU platforms, but this is "
            f"{repr(name) if name else 'an unknown one'}; serve without it."
        )
    if on_gpu() and envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return (
            "VLLM_USE_V2_MODEL_RUNNER=0 is set, but on a GPU bita uses vLLM's V2 model runner; "
            "unset it."
        )
    if not on_gpu() and envs.VLLM_USE_V2_MODEL_RUNNER:
        return (
            "VLLM_USE_V2_MODEL_RUNNER=1 is set, but on CPU bita uses vLLM's V1 model runner; "
            "unset it."
        )
    return None


def claim_engine(args: EngineArgs, parallel_config: ParallelConfig) -> None:
    """Take worker class, attention backend and scheduling for bita, unless the user asked for others.

    Source: VllmConfig.__post_init__ and CpuPlatform.check_and_update_config, which run after this
    and keep a worker class that is not 'auto' and an async_scheduling that is not None.
    """
    # Here already: vLLM's own message about LoRA with drafts is about row counts.
    _refuse_first([("LoRA (enable_lora)", args.enable_lora)])
    if refusal := refuse_platform():
        raise ConfigError(refusal)
    worker_cls = GPU_WORKER_CLS if on_gpu() else CPU_WORKER_CLS
    if parallel_config.worker_cls not in ("auto", worker_cls):
        raise ConfigError(
            f"worker_cls is {parallel_config.worker_cls!r}, but bita needs its own worker; "
            "leave it out."
        )
    if args.scheduler_cls not in (None, SCHEDULER_CLS):
        raise ConfigError(
            f"scheduler_cls is {args.scheduler_cls!r}, but bita needs its own scheduler; "
            "leave it out."
        )
    parallel_config.worker_cls = worker_cls
    args.scheduler_cls = SCHEDULER_CLS
    if on_gpu():
        _claim_gpu_runner(args)
    else:
        _claim_cpu_runner(args)


def _claim_cpu_runner(args: EngineArgs) -> None:
    if args.async_scheduling:
        raise ConfigError(
            "async_scheduling is on, but bita on CPU schedules each step after the last one; "
            "leave it out."
        )
    args.async_scheduling = False


def _claim_gpu_runner(args: EngineArgs) -> None:
    asked = args.attention_backend or args.attention_config.backend
    if asked not in (None, AttentionBackendEnum.TRITON_ATTN, "TRITON_ATTN"):
        raise ConfigError(
            f"attention_backend is {asked!r}, but bita brings its own on the layout of TRITON_ATTN; "
            "leave it out."
        )
    args.attention_backend = None
    args.attention_config.backend = AttentionBackendEnum.TRITON_ATTN


def check_engine(vllm_config: VllmConfig, settings: BitaSettings) -> None:
    """Refuse, by name, what bita cannot serve; on the finished config, before any process."""
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
    if on_gpu():
        _fit_table(vllm_config, settings, budget)
    if vllm_config.scheduler_config.async_scheduling:
        vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER_CLS


def _fit_table(vllm_config: VllmConfig, settings: BitaSettings, budget: int) -> None:
    """Let vLLM have a table by batch size where its one width does not fit in a step for every batch size."""
    lookup = settings.ladder.lookup(vllm_config.scheduler_config.max_num_seqs).tolist()
    fitting = within_budget(lookup, settings.ladder.widths, budget)
    if fitting != lookup:
        table = ranges_of(fitting[1:])
        vllm_config.speculative_config.num_speculative_tokens_per_batch_size = table


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
    yield f"multimodal models ({arch})", model.supports_multimodal_inputs
    yield f"diffusion models ({arch})", model.is_diffusion
    yield f"models with multi-axis rotary positions ({arch})", model.uses_mrope
    yield f"models without attention ({arch})", model.is_attention_free
    # A class for hybrids may hold attention layers only (Granite 4 dense): `is_hybrid` looks at the layers.
    yield f"hybrid or state-space models ({arch})", model.is_hybrid
    yield f"multi-head latent attention ({arch})", model.use_mla
    yield f"chunked local attention ({arch})", model.attention_chunk_size is not None
    yield "prompt embeddings (enable_prompt_embeds)", model.enable_prompt_embeds
    yield "sampling masks (return_sampling_mask)", model.return_sampling_mask
    yield "replayed traces (enable_trace_replay)", model.enable_trace_replay
    installed = [plugin.name for plugin in entry_points(group="vllm.logits_processors")]
    custom = installed + list(model.logits_processors or ())
    # Those of the V2 runner are made for drafts; vLLM's own speculative decoding on V1 refuses them, too.
    feature = f"custom logits processors ({', '.join(map(str, custom))}) on CPU"
    reason = "as those of vLLM's V1 model runner may count steps, and a step with drafts is several"
    yield f"{feature}, {reason}", bool(custom) and not on_gpu()


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
    transfer = c.weight_transfer_config is not None and not on_gpu()
    feature = "weight transfer (weight_transfer_config) on CPU, where weights are renewed by reload_weights"
    yield feature, transfer
    experts = c.aux_output_config.enable_return_routed_experts
    yield "returned experts of a mixture (enable_return_routed_experts)", experts
    yield "text watermarking (watermark_config)", c.watermark_config is not None
    yield "KV connectors (kv_transfer_config)", c.kv_transfer_config is not None
    cache = c.cache_config
    quantised = is_quantized_kv_cache(cache.cache_dtype)
    served = on_gpu() and cache.cache_dtype in FP8_CACHES
    place = "a GPU" if on_gpu() else "CPU"
    yield f"kv_cache_dtype {cache.cache_dtype!r} on {place}", quantised and not served
    skipped = quantised and bool(cache.kv_cache_dtype_skip_layers)
    yield "a KV cache quantised in some layers only (kv_cache_dtype_skip_layers)", skipped
    shared = cache.kv_sharing_fast_prefill
    yield "fast prefill over shared KV (kv_sharing_fast_prefill)", shared


def refuse_prompt(vllm_config: VllmConfig, token_ids: Sequence[int]) -> str | None:
    """Why a prompt cannot be served with bita, or None.

    vLLM lets through what its tokenizer knows, and anything without a tokenizer; with bita, ids behind the
    vocabulary are mask tokens.
    """
    vocab_size = vllm_config.model_config.get_vocab_size()
    if get_settings(vllm_config) is None or not token_ids:
        return None
    wrong = next((i for i in (min(token_ids), max(token_ids)) if not 0 <= i < vocab_size), None)
    if wrong is None:
        return None
    return f"The prompt holds token id {wrong}, but the model's ids are 0 to {vocab_size - 1}."

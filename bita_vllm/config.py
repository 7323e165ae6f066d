"""The user's options: merged, checked, and made into the settings of a run and vLLM's config.

The options come in as vLLM's own speculative options (`--speculative-config`, `--spec-method` ...,
Python dict, speculators format). What cannot be served is refused in `refusals.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import get_field
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from bita_vllm import refusals
from bita_vllm.adapter.checkpoint import Adapter, resolve_adapter_dir
from bita_vllm.adapter.config import AdapterConfig, ModelShape
from bita_vllm.scheduling.copy_rows import copy_ladder
from bita_vllm.scheduling.default_rows import Machine, default_ladder
from bita_vllm.scheduling.row_options import AUTO, choose_ladder
from bita_vllm.scheduling.token_budget import within_budget
from bita_vllm.step.settings import BitaSettings, BitaSpeculativeConfig, ConfigError
from bita_vllm.system import platform
from bita_vllm.tree.copy_templates import with_copies
from bita_vllm.tree.ladder import Ladder, ranges_of
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.template_set import templates_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

CPU_WORKER_CLS = "bita_vllm.runner.cpu.BitaCPUWorker"
GPU_WORKER_CLS = "bita_vllm.runner.gpu.BitaGPUWorker"
SCHEDULER_CLS = "bita_vllm.scheduling.scheduler.BitaScheduler"
ASYNC_SCHEDULER_CLS = "bita_vllm.scheduling.scheduler.BitaAsyncScheduler"
OPTIONS = ("method", "model", "num_speculative_tokens", "tree", "ladder", "copies")


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
    refusals.refuse_model(model_config)
    name = options.get("model")
    if name is None:
        settings = _settings_without_adapter(options, model_config, parallel_config)
    elif isinstance(name, str) and name:
        settings = _settings_with_adapter(name, options, model_config, parallel_config)
    else:
        raise ConfigError(
            f"Speculative option 'model' is {name!r}; expected an adapter's directory or hub name, or no 'model': then "
            "copies of text already seen are the drafts."
        )
    # On the V2 runner vLLM itself follows the table and captures graphs for every width; on the V1 runner
    # its config may not have one (scheduling/scheduler.py).
    ladder = settings.ladder
    always_widest = {width for *_, width in ladder.batch_sizes} == {settings.num_speculative_tokens}
    by_batch_size = list(ladder.batch_sizes) if platform.on_gpu() and not always_widest else None
    return BitaSpeculativeConfig(
        num_speculative_tokens=settings.num_speculative_tokens,
        num_speculative_tokens_per_batch_size=by_batch_size,
        target_model_config=model_config,
        target_parallel_config=parallel_config,
        bita=settings,
    )


def _settings_without_adapter(
    options: Mapping[str, Any], model_config: ModelConfig, parallel_config: ParallelConfig
) -> BitaSettings:
    """Settings of a run whose drafts are copies of text already seen. Raises ConfigError."""
    if platform.on_gpu():
        raise ConfigError(
            "Speculative method 'bita' needs an adapter on a GPU for now: give its directory or hub name as "
            "--speculative-model ('model' in the speculative config)."
        )
    _check_copies(options)
    machine = Machine.here(on_gpu=False).serving(model_config, parallel_config, False)
    ladder, row_share = copy_ladder(options, machine)
    return BitaSettings(
        adapter_dir=None,
        tree=AUTO,
        num_speculative_tokens=ladder.widest.width,
        ladder=ladder,
        num_mask_tokens=0,
        source="copies",
        acceptance=np.zeros((1, 2, 1, 1)),
        row_share=row_share,
    )


def _settings_with_adapter(
    name: str,
    options: Mapping[str, Any],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> BitaSettings:
    """Settings of a run with the adapter of that directory or hub name. Raises ValueError."""
    adapter_dir = str(resolve_adapter_dir(name))
    adapter_config = AdapterConfig.load(adapter_dir)
    shape = ModelShape.from_hf_config(model_config.hf_text_config)
    # All of it, not only its config: a bad adapter is refused before any worker starts.
    adapter = Adapter.load(adapter_dir, shape)

    def default() -> Ladder | None:
        run = model_config, parallel_config, adapter.mask_lora is not None
        return default_ladder(adapter_config, Machine.here(platform.on_gpu()).serving(*run))

    tree, ladder = choose_ladder(options, adapter_config, platform.device_name(), default)
    acceptance = acceptance_table(adapter_config.acceptance, adapter_config.num_mask_tokens)
    copies = _wants_copies(options, tree)
    if not copies and any(t.num_copies for t in templates_of(ladder.template_sets)):
        raise ConfigError(
            'The ladder or tree has nodes for copied tokens, but this run does not copy; give "copies": true in the '
            "speculative config, or a ladder without them."
        )
    if copies:
        ladder = replace(ladder, template_sets=with_copies(ladder.template_sets, acceptance))
    return BitaSettings(
        adapter_dir=adapter_dir,
        tree=tree,
        num_speculative_tokens=ladder.widest.width,
        ladder=ladder,
        num_mask_tokens=adapter_config.num_mask_tokens,
        source="masks and copies" if copies else "masks",
        acceptance=acceptance,
        mask_lora=None if adapter.mask_lora is None else adapter.mask_lora.outline,
    )


def _wants_copies(options: Mapping[str, Any], tree: str) -> bool:
    """Whether blocks may copy text already seen: unless the user says no, or gave a tree of their own.

    On a GPU only if the user says so: nobody has timed it there.
    """
    asked = _check_copies(options)
    if asked is None:
        return tree == AUTO and not platform.on_gpu()
    return asked


def _check_copies(options: Mapping[str, Any]) -> bool | None:
    """What the user says of copies, None for nothing. Raises ConfigError."""
    asked = options.get("copies")
    if asked is not None and not isinstance(asked, bool):
        raise ConfigError(
            f"Speculative option 'copies' is {asked!r}; expected true or false: whether blocks may copy text that a "
            "request has already seen."
        )
    return asked


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


def claim_engine(args: EngineArgs, parallel_config: ParallelConfig) -> None:
    """Take worker class, attention backend and scheduling for bita, unless the user asked for others.

    Source: VllmConfig.__post_init__ and CpuPlatform.check_and_update_config, which run after this
    and keep a worker class that is not 'auto' and an async_scheduling that is not None.
    """
    refusals.refuse_arguments(args)
    worker_cls = GPU_WORKER_CLS if platform.on_gpu() else CPU_WORKER_CLS
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
    if platform.on_gpu():
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
    refusals.refuse_engine(vllm_config, settings)
    if platform.on_gpu():
        _fit_table(vllm_config, settings)
    if vllm_config.scheduler_config.async_scheduling:
        vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER_CLS


def _fit_table(vllm_config: VllmConfig, settings: BitaSettings) -> None:
    """Let vLLM have a table by batch size where its one width does not fit in a step for every batch size."""
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    lookup = settings.ladder.lookup(vllm_config.scheduler_config.max_num_seqs).tolist()
    fitting = within_budget(lookup, settings.ladder.widths, budget)
    if fitting != lookup:
        table = ranges_of(fitting[1:])
        vllm_config.speculative_config.num_speculative_tokens_per_batch_size = table

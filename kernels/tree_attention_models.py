"""Shipped configurations of `tree_attention`: the models that are tested, and the corners of what is supported."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention_config import EARLY_SM, AttentionConfig
from .checks import QUANTISED_TYPES, TRITON_TYPES
from .shipped import TARGETS, Shipped
from .tree_attention_kernel import combine_splits_kernel, tree_attention_kernel


@dataclass(frozen=True)
class _Model:
    """What of a model a launch is compiled for.

    With an fp8 cache the queries are fp8, too: vLLM's Attention quantises them on CUDA.
    """

    name: str
    group: int
    head_size: int
    dtype: torch.dtype
    num_rows: int
    cache_dtype: torch.dtype | None = None
    window: int = 0
    softcap: bool = False
    sinks: bool = False
    block_size: int = 16


_MODELS = (
    _Model("Llama-3-8B R4", 4, 128, torch.bfloat16, 4),
    _Model("Llama-3-8B R8", 4, 128, torch.bfloat16, 8),
    _Model("Llama-3-8B R16", 4, 128, torch.bfloat16, 16),
    _Model("Llama-3-8B R24", 4, 128, torch.bfloat16, 24),
    _Model("Llama-3-8B fp16 R52", 4, 128, torch.float16, 52),
    _Model("Llama-3-8B fp8 KV R16", 4, 128, torch.bfloat16, 16, torch.float8_e4m3fn),
    _Model("Llama-3-8B fp16 fp8 KV R52", 4, 128, torch.float16, 52, torch.float8_e4m3fn),
    _Model("SmolLM2-135M fp8 KV R16", 3, 64, torch.bfloat16, 16, torch.float8_e4m3fn),
    _Model(
        "Gemma-2-9B fp8 KV D256 R16", 2, 256, torch.bfloat16, 16, torch.float8_e4m3fn, 4096, True
    ),
    _Model("SmolLM2-135M R16", 3, 64, torch.bfloat16, 16),
    _Model("SmolLM2-135M fp32 R16", 3, 64, torch.float32, 16),
    _Model("Llama-3-8B fp32 R16", 4, 128, torch.float32, 16),
    _Model("Phi-2 D80 R16", 1, 80, torch.bfloat16, 16),
    _Model("Phi-3-mini D96 window R16", 1, 96, torch.bfloat16, 16, window=2047),
    _Model("D192 R16", 4, 192, torch.bfloat16, 16),
    _Model("Gemma-2-9B D256 softcap window R16", 2, 256, torch.bfloat16, 16, None, 4096, True),
    _Model("GPT-OSS sinks window R16", 8, 64, torch.bfloat16, 16, None, 128, False, True),
)


# Targets by whether the merge starts early.
_LATE = tuple(sm for sm in TARGETS if sm < EARLY_SM)
_EARLY = tuple(sm for sm in TARGETS if sm >= EARLY_SM)


def shipped() -> list[Shipped]:
    """The models, and the corners of what is supported; each with splits in parallel and in turn."""
    listed = []
    for model in _MODELS:
        listed.append(_shipped_kernel(model, TARGETS, parallel=False))
        for targets in (_LATE, _EARLY):
            listed.append(_shipped_kernel(model, targets, parallel=True))
    merged = _MODELS[2:3] + _MODELS[-2:-1]
    return listed + [_shipped_combine(m, targets) for m in merged for targets in (_LATE, _EARLY)]


def _config(model: _Model) -> AttentionConfig:
    return AttentionConfig.choose(
        model.head_size, model.dtype, model.group, model.num_rows, num_kv_heads=8
    )


def _shipped_kernel(model: _Model, targets: tuple[int, ...], parallel: bool) -> Shipped:
    config = _config(model)
    kind = f"*{TRITON_TYPES[model.dtype]}"
    quantised = model.cache_dtype is not None
    cache = kind if model.cache_dtype is None else f"*{QUANTISED_TYPES[model.cache_dtype]}"
    given = {
        **dict.fromkeys(("out_ptr", "prompt_keys_ptr", "prompt_values_ptr"), kind),
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), cache),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }
    absent: dict[str, None] = {}
    optional = (
        (("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), quantised, "*fp32"),
        (("sinks_ptr",), model.sinks, kind),
        (("partial_acc_ptr", "partial_stats_ptr"), parallel, "*fp32"),
    )
    for names, present, pointer in optional:
        given |= dict.fromkeys(names, pointer) if present else {}
        absent |= {} if present else dict.fromkeys(names)
    constants = {
        **_shape_constants(model),
        "PARALLEL": parallel,
        "EARLY_COMBINE": parallel and targets == _EARLY,
        "SOFTCAP": model.softcap,
        "SINKS": model.sinks,
        "QUANTISED_QUERY": quantised,
        "QUANTISED": quantised,
        **absent,
    }
    names = tree_attention_kernel.arg_names
    rest = {
        name: "*i32" if name.endswith("_ptr") else "i32"
        for name in names
        if name not in given and name not in constants
    }
    return Shipped(
        name=f"{model.name} {'splits side by side' if parallel else 'splits in turn'}",
        kernel=tree_attention_kernel,
        signature=given | rest,
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=tuple(name for name in rest if name.endswith("_stride")),
        tensor_cores=model.dtype != torch.float32,
        targets=tuple(sm for sm in targets if sm >= 89 or cache != "*fp8e4nv"),
    )


def _shape_constants(model: _Model) -> dict[str, int]:
    return _config(model).constants(
        num_kv_heads=8,
        group=model.group,
        num_rows=model.num_rows,
        num_prompt=16,
        head_size=model.head_size,
        block_size=model.block_size,
        window=model.window,
    )


def _shipped_combine(model: _Model, targets: tuple[int, ...]) -> Shipped:
    config = _config(model)
    pointers = {
        "out_ptr": f"*{TRITON_TYPES[model.dtype]}",
        **dict.fromkeys(("query_start_ptr", "seq_len_ptr"), "*i32"),
        **dict.fromkeys(("partial_acc_ptr", "partial_stats_ptr"), "*fp32"),
    }
    integers = (
        "out_row_stride", "out_head_stride", "num_partial_rows", "stats_size", "in_turn_slots"
    )  # fmt: skip
    return Shipped(
        name=f"{model.name} combine",
        kernel=combine_splits_kernel,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constexprs=config.combine_constants(
            num_q_heads=8 * model.group,
            num_rows=model.num_rows,
            head_size=model.head_size,
            window=model.window,
        )
        | {"launch_pdl": targets == _EARLY},
        divisible=("out_row_stride", "out_head_stride"),
        targets=targets,
    )

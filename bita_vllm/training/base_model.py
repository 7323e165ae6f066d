"""The base model as data, training and evaluation need it: tokenizer, transformers model, vLLM engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bita_vllm.training.samples import DataError

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_tokenizer(model: str, revision: str | None) -> tuple[Any, str | None]:
    """The tokenizer, and the commit of a model on the hub. Raises DataError."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The model {model!r} could not be loaded: {' '.join(str(error).split())}"
        ) from error
    return tokenizer, getattr(config, "_commit_hash", None) or revision


@contextmanager
def start_engine(model: str, **options: Any) -> Iterator[Any]:
    """vLLM's offline engine, shut down at the end. Raises DataError with vLLM's reason."""
    from vllm import LLM

    try:
        llm = LLM(model, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"vLLM could not start with {model}: {reason}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def load_base(model: str, revision: str | None, device: str, dtype: str) -> Any:
    """The base model on its device. Raises AdapterError if it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    from bita_vllm.adapter.config import AdapterError

    device = choose_device(device)
    chosen = getattr(torch, choose_dtype(dtype, device))
    try:
        base = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=chosen)
        return base.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"The model {model!r} could not be loaded: {reason}") from error


def choose_device(device: str) -> str:
    """'auto': the GPU if there is one. CUDA is not touched: vLLM may fork its engine from this process."""
    import torch

    if device != "auto":
        return device
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> str:
    """'auto': bfloat16 on GPUs and on CPUs with instructions for it; float32 elsewhere, where bfloat16
    matrix products are many times slower."""
    import torch

    if dtype != "auto":
        return dtype
    multiplies_bfloat16 = (
        device != "cpu"
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return "bfloat16" if multiplies_bfloat16 else "float32"

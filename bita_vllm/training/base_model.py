"""The base model as data and evaluation need it: tokenizer and vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bita_vllm.training.samples import DataError


def load_tokenizer(model: str, revision: str | None) -> tuple[Any, str | None]:
    """The tokenizer, and the commit of a model on the hub. Raises DataError."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The model {model!r} could not be had: {' '.join(str(error).split())}"
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

"""Mask ids at the model's input: ids V, V+1, ... read the adapter's mask embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)


class MaskEmbedding(nn.Module):
    """The model's token embedding, and mask embeddings behind its last id."""

    mask_embeddings: torch.Tensor

    def __init__(
        self,
        tokens: nn.Module,
        # [k, H]
        mask_embeddings: torch.Tensor,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.vocab_size = vocab_size
        self.register_buffer("mask_embeddings", mask_embeddings, persistent=False)

    def __getattr__(self, name: str) -> Any:
        # Gemma-2 and its like hand this module to the logits processor, as their output head.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tokens"), name)

    def forward(
        self,
        # [rows]
        input_ids: torch.Tensor,
    ) -> torch.Tensor:
        """`[rows]` ids -> `[rows, H]`."""
        is_mask = input_ids >= self.vocab_size
        embedded = self.tokens(input_ids.masked_fill(is_mask, 0))
        index = (input_ids - self.vocab_size).clamp(0, len(self.mask_embeddings) - 1)
        return torch.where(is_mask[:, None], self.mask_embeddings[index], embedded)


def insert_mask_embedding(
    model: nn.Module,
    # [k, H]
    mask_embeddings: torch.Tensor,
    vocab_size: int,
) -> None:
    """Wrap the model's one input embedding; a tied output head keeps the original module.

    Raises:
        ValueError: the model has no, or more than one, input embedding.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, VocabParallelEmbedding)
        and not isinstance(child, ParallelLMHead)
        and name != "lm_head"
    ]
    if len(found) != 1:
        raise ValueError(
            f"bita needs a model with one token embedding (VocabParallelEmbedding), but "
            f"{type(model).__name__} has {len(found)}; this model is not supported."
        )
    parent, name, child = found[0]
    setattr(parent, name, MaskEmbedding(child, mask_embeddings.to(child.weight.dtype), vocab_size))

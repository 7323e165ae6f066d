"""Mask ids at the model's input: ids V, V+1, ... read the adapter's mask embeddings."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)


class MaskEmbedding:
    """Makes a token embedding read mask embeddings for ids beyond its last one.

    It goes into the class of the model's own module: all parameters keep their names, by which vLLM and trainers
    load new weights into a running engine, and which checkpoints are saved by.

    Attributes:
        mask_embeddings: `[k, H]`, a buffer.
        first_mask_id: V.
    """

    mask_embeddings: torch.Tensor
    first_mask_id: int

    def forward(
        self,
        # [rows], or [1, rows] in models of the Transformers backend
        input_ids: torch.Tensor,
    ) -> torch.Tensor:
        """`[..., H]` for ids of any shape."""
        is_mask = input_ids >= self.first_mask_id
        embedded = super().forward(input_ids.masked_fill(is_mask, 0))  # type: ignore[misc]
        index = (input_ids - self.first_mask_id).clamp(0, len(self.mask_embeddings) - 1)
        return torch.where(is_mask.unsqueeze(-1), self.mask_embeddings[index], embedded)


def token_embedding(model: nn.Module) -> VocabParallelEmbedding:
    """Return the model's one input embedding; an output head tied to it is none.

    Raises:
        ValueError: the model has no, or more than one, input embedding.
    """
    found = [
        child
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
    return found[0]


def insert_mask_embedding(
    model: nn.Module,
    # [k, H]
    mask_embeddings: torch.Tensor,
    vocab_size: int,
) -> None:
    """Let the model's input embedding read mask embeddings; an output head tied to it stays as it is."""
    embedding = token_embedding(model)
    # On vLLM's Transformers backend the module itself scales tokens; elsewhere the model scales what it gives.
    scaled = mask_embeddings * float(getattr(embedding, "embed_scale", 1.0))
    embedding.register_buffer(
        "mask_embeddings", scaled.to(embedding.weight.dtype), persistent=False
    )
    embedding.first_mask_id = vocab_size
    stock = type(embedding)
    embedding.__class__ = type(f"Mask{stock.__name__}", (MaskEmbedding, stock), {})

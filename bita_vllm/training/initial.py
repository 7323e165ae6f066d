"""Where training starts: mask embeddings near the mean token, prompt tokens from real text.

Both start nearer to what the base model is used to than noise does, and accept more after the same
number of steps (docs/training.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bita_vllm.adapter.checkpoint import Adapter, random_adapter
from bita_vllm.adapter.config import AdapterError, ModelShape
from bita_vllm.training.mask_model import MaskModel


def new_model(
    base: PreTrainedModel,
    num_masks: int,
    num_prompt_tokens: int,
    seed: int,
    text: Sequence[int],
    verifier: str,
) -> MaskModel:
    """An untrained MaskModel: each mask embedding the mean of all token embeddings plus a little
    noise, the prompt tokens the keys and values of the first tokens of `text`.

    `verifier` is the base model's name or path, for the adapter's config. Raises AdapterError.
    """
    if len(text) < num_prompt_tokens:
        raise AdapterError(
            f"{num_prompt_tokens} prompt tokens start from as many tokens of text, but the data "
            f"holds {len(text)}; ask for fewer prompt tokens or add data."
        )
    model = MaskModel(base, _random(base, num_masks, num_prompt_tokens, seed, verifier))
    embeddings = base.get_input_embeddings().weight.float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_masks, embeddings.shape[1], generator=generator)
    with torch.no_grad():
        spread = 0.1 * float(embeddings.std())
        model.mask_embeddings.copy_(embeddings.mean(dim=0) + spread * noise.to(embeddings.device))
        if num_prompt_tokens:
            ids = torch.tensor([list(text[:num_prompt_tokens])], device=embeddings.device)
            context = model.context(ids)
            for recorded, parameter in (
                (context.keys, model.prompt_keys),
                (context.values, model.prompt_values),
            ):
                parameter.copy_(torch.cat(recorded).transpose(1, 2))  # [L, P, Hkv, D]
    return model


def _random(
    base: PreTrainedModel, num_masks: int, num_prompt_tokens: int, seed: int, verifier: str
) -> Adapter:
    config = base.config.get_text_config()
    layer_config = json.loads(config.to_json_string(use_diff=False))
    layer_config.pop("_name_or_path", None)  # `verifier` says it
    return random_adapter(
        ModelShape.from_hf_config(config),
        num_masks,
        num_prompt_tokens,
        seed,
        verifier=verifier,
        transformer_layer_config=layer_config,
    )

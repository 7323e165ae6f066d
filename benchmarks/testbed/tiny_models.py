"""Tiny random Hugging Face checkpoints, one for each architecture of the support matrix. Nothing is downloaded."""

from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from testbed.architectures import ARCHITECTURES, COMMON, GATED, MAX_POSITIONS

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # ids 0, 1, 2
# What bita refuses when it sees the layers.
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi
    "gemma3n_text": {  # embeddings by layer, shared KV caches
        **GATED,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "laurel_rank": 8,
    },
}


def make_tiny_model(
    folder: Path, architecture: str, dtype: str = "float32", **overrides: Any
) -> Path:
    """Write a random model of `architecture` and its tokenizer to `folder`, and return `folder`.

    `overrides` replaces fields of the Hugging Face config. Weights are the same on every call, and
    larger than an untrained model's, so that logits stand well apart and greedy outputs vary.
    """
    known = architecture in ARCHITECTURES
    own = ARCHITECTURES[architecture].config if known else REFUSED[architecture]
    config = AutoConfig.for_model(architecture, **{**COMMON, **own, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases: no longer exactly 1 or 0
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
        if architecture == "gemma2":  # scales its tied embeddings up: it would repeat its input
            model.get_input_embeddings().weight.div_(6)
            model.model.norm.weight.add_(5)  # logits as large as before
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 935 tokens: special tokens, bytes, pairs of small letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(ascii_lowercase, repeat=2))
    tokens = [*SPECIAL_TOKENS, *letters, *map("".join, pairs)][:vocab_size]
    merges = [pair for pair in pairs if "".join(pair) in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=MAX_POSITIONS,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )

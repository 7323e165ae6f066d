"""Tiny random Hugging Face checkpoints, one for each kind of decoder that BiTA must work with.

All have 4 query heads and head size 32 or 64, which vLLM's CPU attention takes: hidden size 128.
Nothing is downloaded.
"""

from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # ids 0, 1, 2
MAX_POSITIONS = 1024

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
GATED: dict[str, Any] = {"intermediate_size": 256, "num_key_value_heads": 2}

# What each architecture adds: the feature of attention or embedding that it is here for.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen2": GATED,  # bias on q, k, v
    "qwen3": {**GATED, "head_dim": 64},  # norm on q and k; heads wider than the hidden size
    "mistral": {**GATED, "head_dim": 32, "sliding_window": 32},
    "phi3": GATED,  # fused qkv and gate-up
    "gemma2": {  # softcaps, scaled embeddings, every other layer with a sliding window
        **GATED,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "gpt2": {"n_positions": MAX_POSITIONS},  # learned positions, multi-head attention
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},  # learned positions with an offset
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Served, and not trained in the tests.
SERVED_ONLY: dict[str, dict[str, Any]] = {
    # attention only, in a class for hybrids
    "granitemoehybrid": {
        **GATED,
        "layer_types": ["attention"] * 3,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 256,
        "position_embedding_type": "rope",
    },
    # a shared expert next to the routed ones
    "qwen2_moe": {
        **GATED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    # in vLLM's Transformers backend
    "olmo2": GATED,  # norms after attention and MLP
    "smollm3": {**GATED, "no_rope_layers": [1, 1, 0]},
    "starcoder2": GATED,  # layer norms, biases, no gate
    "gpt_neox": {"intermediate_size": 256},  # parallel MLP, fused qkv
    "phi": GATED,  # rotary part of a head
    # attention sinks, every other layer with a sliding window; a mixture whose experts have biases
    "gpt_oss": {
        **GATED,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
# What bita refuses.
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
    config = AutoConfig.for_model(
        architecture,
        **{**COMMON, **(ARCHITECTURES | SERVED_ONLY | REFUSED)[architecture], **overrides},
    )
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

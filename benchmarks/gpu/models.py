"""Models of the suite: the embedded one, a tiny random one, shapes without weights; and their adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

NUM_MASKS, NUM_PROMPT_TOKENS = 3, 16
LORA_RANK = 16  # the shipped adapter's
LARGE = "Llama-3-8B"
SHAPES: dict[str, dict[str, Any]] = {
    LARGE: {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
COMMON = {"torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1}
# linear layers of a Llama decoder layer -> their input and output, as attributes of its shape
LINEAR = {
    "self_attn.q_proj": ("hidden", "query"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("query", "hidden"),
    "mlp.gate_proj": ("hidden", "inner"),
    "mlp.up_proj": ("hidden", "inner"),
    "mlp.down_proj": ("inner", "hidden"),
}


def make_shape(folder: Path, name: str) -> Path:
    """A directory with the config of a large model alone: for `load_format="dummy"`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}))
    return folder


def make_tiny(folder: Path, num_layers: int) -> Path:
    """A random model of a few million parameters, with a tokenizer."""
    from testbed.tiny_models import make_tiny_model

    return (
        folder
        if folder.exists()
        else make_tiny_model(folder, "llama", num_hidden_layers=num_layers)
    )


def make_adapter(
    folder: Path, model: Path, acceptance: dict[str, Any] | None = None, lora_rank: int = 0
) -> Path:
    """A random adapter for a Llama model, with low-rank deltas on every linear layer if a rank is given.

    With a trained adapter's `acceptance` it gets that one's trees; not its template sets, whose choice
    among trees asks for the probabilities of trained masks.
    """
    from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
    from bita_vllm.adapter.config import ModelShape

    if folder.exists():
        return folder
    config = json.loads((model / "config.json").read_text())
    adapter = random_adapter(
        ModelShape.from_hf_config(config), NUM_MASKS, NUM_PROMPT_TOKENS, 0,
        embedding_std=0.15, prompt_std=0.5, verifier=str(model), speculative_tokens=15,
    )  # fmt: skip
    if acceptance is not None:
        kept = {name: value for name, value in acceptance.items() if name != "template_sets"}
        raw = {**adapter.config.raw, "acceptance": kept}
        adapter = replace(adapter, config=type(adapter.config).from_dict(raw))
    if lora_rank:
        adapter = replace(adapter, mask_lora=random_deltas(config, lora_rank))
    save_adapter(folder, adapter)
    return folder


def random_deltas(config: dict[str, Any], rank: int) -> Any:
    """Small random deltas on every linear layer of a Llama model's decoder."""
    from bita_vllm.adapter.deltas import MaskLoraWeights

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    sizes = {
        "hidden": hidden,
        "query": heads * head_size,
        "kv": config["num_key_value_heads"] * head_size,
        "inner": config["intermediate_size"],
    }
    generator = torch.Generator().manual_seed(0)

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.01).bfloat16()

    modules = {
        f"model.layers.{layer}.{name}": (small(rank, sizes[source]), small(sizes[target], rank))
        for layer in range(config["num_hidden_layers"])
        for name, (source, target) in LINEAR.items()
    }
    return MaskLoraWeights(rank, float(rank), modules)


def acceptance_of(adapter: Path) -> dict[str, Any] | None:
    """The statistics that 'bita eval' left in an adapter's config, if any."""
    return json.loads((adapter / "config.json").read_text()).get("acceptance")


def some_prompts(number: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids from a fixed rule, none of them special."""
    return [[3 + (31 * i + 7 * n) % (vocab_size - 3) for n in range(length)] for i in range(number)]

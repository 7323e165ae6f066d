"""The architectures of the support matrix as data: for each the config of a tiny random model.

All have 4 query heads and head size 32 or 64, which vLLM's CPU attention takes: hidden size 128. A key is the model
type in transformers. `make matrix` runs them all; docs/support.md is made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
HEADS: dict[str, Any] = {**GATED, "head_dim": 32}
# Every other layer with a sliding window.
WINDOWS: dict[str, Any] = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
GPT: dict[str, Any] = {"n_positions": MAX_POSITIONS, "n_embd": 128, "n_layer": 3, "n_head": 4}

WORKS = "works"


@dataclass(frozen=True)
class Architecture:
    """One row of the support matrix.

    Attributes:
        models: what people call those that have it.
        features: of attention or embedding that it is here for.
        config: what it adds to COMMON.
        backend: the class in vLLM, or 'Transformers' for vLLM's backend of that name.
        gpu_runner, training: WORKS, or why the cell is empty.
    """

    models: str
    features: str
    config: dict[str, Any] = field(default_factory=dict)
    backend: str = "own class"
    gpu_runner: str = WORKS
    training: str = WORKS


TRANSFORMERS = "Transformers"

# Why a cell of training is empty: what `bita train` refuses, and where there is nothing to compare with.
KEYWORDS = "refused: its class in transformers hands no keywords on to attention"
OWN_ATTENTION = "refused: it attends in a way of its own, not through transformers' interface"
OTHER_LOGITS = "not compared: vLLM's logits of ordinary tokens are not transformers'"
LOGITS = "refused: its logits come out otherwise than through transformers' interface"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama 2 and 3, Yi, SmolLM 1 and 2", "", GATED),
    "llama4_text": Architecture(
        "Llama 4 (text)",
        "attention in chunks, a shared expert, layers without rotary positions",
        {
            **HEADS,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 1, 0],
        },
        gpu_runner="refused: attention in chunks",
        training="refused: attention in chunks",
    ),
    "qwen2": Architecture("Qwen2, Qwen2.5", "bias on q, k, v", GATED),
    "qwen3": Architecture(
        "Qwen3",
        "norm on q and k; heads wider than the hidden size",
        {**GATED, "head_dim": 64},
    ),
    "mistral": Architecture("Mistral 7B", "sliding window", {**HEADS, "sliding_window": 32}),
    "ministral": Architecture("Ministral", "windows", {**HEADS, **WINDOWS}, TRANSFORMERS),
    "ministral3": Architecture("Ministral 3", "scaled queries", HEADS),
    "phi": Architecture("Phi-1, Phi-2", "rotary part of a head", GATED, TRANSFORMERS),
    "phi3": Architecture("Phi-3, Phi-4", "fused qkv and gate-up", GATED),
    "gemma": Architecture("Gemma", "scaled embeddings", HEADS),
    "gemma2": Architecture(
        "Gemma 2",
        "softcaps, scaled embeddings, windows",
        {
            **GATED,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        "two rotary bases, windows, norm on q and k",
        {**HEADS, **WINDOWS, "query_pre_attn_scalar": 32},
    ),
    "vaultgemma": Architecture(
        "VaultGemma",
        "softcaps, windows",
        {**HEADS, **WINDOWS, "query_pre_attn_scalar": 32},
        TRANSFORMERS,
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        "attention sinks, windows; a mixture whose experts have biases",
        {**HEADS, **WINDOWS, **LOCAL_EXPERTS},
    ),
    "mixtral": Architecture("Mixtral", "mixture of experts", {**GATED, **LOCAL_EXPERTS}),
    "qwen2_moe": Architecture(
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        "a shared expert next to the routed ones",
        {**GATED, **EXPERTS, "shared_expert_intermediate_size": 128},
    ),
    "qwen3_moe": Architecture("Qwen3 MoE", "mixture of experts", {**HEADS, **EXPERTS}),
    "granite": Architecture(
        "Granite 3",
        "multipliers of embeddings, attention, residuals and logits",
        {
            **GATED,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "granitemoe": Architecture("Granite 3 MoE", "mixture of experts", {**GATED, **LOCAL_EXPERTS}),
    "granitemoeshared": Architecture(
        "Granite MoE, shared",
        "a shared expert",
        {**GATED, **LOCAL_EXPERTS, "shared_intermediate_size": 128},
    ),
    "granitemoehybrid": Architecture(
        "Granite 4, dense",
        "attention only, in a class for hybrids",
        {
            **GATED,
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "position_embedding_type": "rope",
        },
    ),
    "granite_swa": Architecture("Granite, windows", "windows", {**GATED, "sliding_window": 32}),
    "granitemoe_swa": Architecture(
        "Granite MoE, windows",
        "windows, mixture of experts",
        {**GATED, **LOCAL_EXPERTS, "sliding_window": 32},
    ),
    "cohere": Architecture("Command R", "parallel attention and MLP, interleaved rotary", GATED),
    "cohere2": Architecture(
        "Command R7B, Command A", "windows", {**HEADS, **WINDOWS}, training=OTHER_LOGITS
    ),
    "cohere2_moe": Architecture(
        "Command A, mixture",
        "windows, mixture of experts",
        {**HEADS, **EXPERTS, **WINDOWS},
        training=OTHER_LOGITS,
    ),
    "olmo": Architecture("OLMo", "clipped q, k, v", {**GATED, "clip_qkv": 4.0}, TRANSFORMERS),
    "olmo2": Architecture("OLMo 2", "norms after attention and MLP", GATED, TRANSFORMERS),
    "olmo3": Architecture("OLMo 3", "windows", {**GATED, **WINDOWS}, TRANSFORMERS),
    "olmoe": Architecture(
        "OLMoE", "mixture of experts", {**GATED, "num_experts": 4, "num_experts_per_tok": 2}
    ),
    "flex_olmo": Architecture(
        "FlexOlmo",
        "mixture of experts",
        {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
        TRANSFORMERS,
    ),
    "smollm3": Architecture(
        "SmolLM3",
        "layers without rotary positions",
        {**GATED, "no_rope_layers": [1, 1, 0]},
        TRANSFORMERS,
    ),
    "seed_oss": Architecture("Seed-OSS", "", HEADS, TRANSFORMERS),
    "starcoder2": Architecture("StarCoder2", "layer norms, biases, no gate", GATED, TRANSFORMERS),
    "arcee": Architecture("Arcee AFM", "squared ReLU", GATED, TRANSFORMERS),
    "helium": Architecture("Helium", "interleaved rotary", HEADS, TRANSFORMERS),
    "hunyuan_v1_moe": Architecture(
        "Hunyuan-A13B",
        "mixture of experts",
        {
            **HEADS,
            "num_experts": 4,
            "moe_topk": 2,
            "moe_intermediate_size": 256,
            "num_shared_expert": 1,
        },
        TRANSFORMERS,
    ),
    "hunyuan_v1_dense": Architecture("Hunyuan, dense", "norm on q and k", HEADS, TRANSFORMERS),
    "nemotron": Architecture("Nemotron 3 and 4", "squared ReLU, no gate", HEADS, training=KEYWORDS),
    "apertus": Architecture("Apertus", "xIELU, norm on q and k", GATED, training=OTHER_LOGITS),
    "stablelm": Architecture(
        "StableLM 2", "rotary part of a head, layer norms", GATED, training=KEYWORDS
    ),
    "glm": Architecture("GLM-4 9B", "rotary part of a head", HEADS, TRANSFORMERS),
    "glm4": Architecture("GLM-4 0414", "norms around attention and MLP", HEADS),
    "glm4_moe": Architecture(
        "GLM-4.5, GLM-4.6",
        "mixture of experts after a dense layer",
        {**HEADS, **ROUTED_EXPERTS, "first_k_dense_replace": 1},
    ),
    "exaone4": Architecture("EXAONE 4", "windows", {**GATED, **WINDOWS}),
    "exaone_moe": Architecture(
        "K-EXAONE",
        "windows, mixture of experts after a dense layer",
        {
            **GATED,
            **WINDOWS,
            **EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "ernie4_5": Architecture("ERNIE 4.5", "interleaved rotary", HEADS),
    "ernie4_5_moe": Architecture(
        "ERNIE 4.5 MoE",
        "mixture of experts after a dense layer",
        {
            **HEADS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
        training=OTHER_LOGITS,
    ),
    "hyperclovax": Architecture("HyperCLOVA X", "multipliers", GATED),
    "dots1": Architecture(
        "dots.llm1",
        "mixture of experts after a dense layer",
        {**HEADS, **ROUTED_EXPERTS, "first_k_dense_replace": 1},
        TRANSFORMERS,
    ),
    "solar_open": Architecture(
        "Solar Open", "mixture of experts", {**HEADS, **ROUTED_EXPERTS}, TRANSFORMERS
    ),
    "mellum": Architecture("Mellum", "mixture of experts", {**HEADS, **EXPERTS}, TRANSFORMERS),
    "jais2": Architecture("Jais 2", "layer norms, no gate", GATED, TRANSFORMERS),
    "nanochat": Architecture("nanochat", "norm on q and k, softcap", GATED, TRANSFORMERS),
    "cwm": Architecture("CWM", "windows", {**HEADS, **WINDOWS}, TRANSFORMERS),
    "doge": Architecture("Doge", "", GATED, TRANSFORMERS, training=LOGITS),
    "bitnet": Architecture("BitNet", "norms inside attention and MLP", GATED, TRANSFORMERS),
    "persimmon": Architecture(
        "Persimmon", "fused qkv, norm on q and k", {"intermediate_size": 256}, TRANSFORMERS
    ),
    "biogpt": Architecture("BioGPT", "learned positions", {"intermediate_size": 256}, TRANSFORMERS),
    "falcon": Architecture(
        "Falcon 7B",
        "one KV head, parallel attention and MLP",
        {
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "bias": False,
        },
        training=OWN_ATTENTION,
    ),
    "gpt2": Architecture("GPT-2", "learned positions", {"n_positions": MAX_POSITIONS}),
    "gptj": Architecture(
        "GPT-J", "rotary part of a head", {**GPT, "rotary_dim": 16}, training=OWN_ATTENTION
    ),
    "gpt_neox": Architecture(
        "Pythia, GPT-NeoX",
        "parallel MLP, fused qkv",
        {"intermediate_size": 256},
        TRANSFORMERS,
    ),
    "gpt_bigcode": Architecture("StarCoder", "one KV head", GPT, TRANSFORMERS),
    "opt": Architecture(
        "OPT", "learned positions with an offset", {"ffn_dim": 256, "word_embed_proj_dim": 128}
    ),
}

# Those whose training is tested against its specification, each of another kind.
TRAINED = (
    *("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt2", "opt", "mixtral"),
    *("gpt_oss", "granite"),
)

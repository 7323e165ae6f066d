"""How large a base model is: what a step reads and multiplies, by the dimensions in its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bita_vllm.adapter.config import ModelShape

MLP_MATRICES = 3  # gate, up and down; an MLP without a gate is taken for a third too large


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a decoder.

    Attributes:
        intermediate_size: of its MLP, or of each of its experts.
        num_experts: of a layer; 1 for a plain MLP.
        experts_per_row: that one row goes through.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_experts: int = 1
    experts_per_row: int = 1

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelSize:
        """Read the size from a Hugging Face text config; what it does not say is taken as most models have it.

        Raises AdapterError if the config lacks a dimension that `ModelShape` needs.
        """
        shape = ModelShape.from_hf_config(config)

        def find(default: int, *names: str) -> int:
            values = (config.get(name) for name in names)
            return next((v for v in values if type(v) is int and v > 0), default)

        experts = find(1, "num_local_experts", "num_experts", "n_routed_experts")
        inner = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
        return cls(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=find(
                4 * shape.hidden_size, *(("moe_intermediate_size",) if experts > 1 else ()), *inner
            ),
            num_q_heads=find(shape.num_kv_heads, "num_attention_heads", "n_head"),
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            vocab_size=shape.vocab_size,
            num_experts=experts,
            experts_per_row=min(
                experts, find(1, "num_experts_per_tok", "moe_topk", "num_experts_per_token")
            ),
        )

    @property
    def attention_params(self) -> int:
        """Weights of all attention layers."""
        heads = 2 * self.num_q_heads + 2 * self.num_kv_heads
        return self.num_layers * self.hidden_size * heads * self.head_size

    @property
    def expert_params(self) -> int:
        """Weights of one expert in every layer; of the MLPs where there are no experts."""
        return self.num_layers * MLP_MATRICES * self.hidden_size * self.intermediate_size

    @property
    def layer_params(self) -> int:
        """Weights that one row goes through, the output head left out."""
        return self.attention_params + self.experts_per_row * self.expert_params

    @property
    def head_params(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

"""CPU attention backend: vLLM's own kernel for causal rows, tree attention (bita_kernels) for step blocks.

KV cache, slots and writes are stock (vllm/v1/attention/backends/cpu_attn.py): a block's rows lie in
linear slots after the committed context. Its `vec` layout, which we pin, keeps keys transposed:
`[num_blocks, Hkv, D, block_size]` next to values `[num_blocks, Hkv, block_size, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from bita_vllm.step.host import StepBlocks


class TreeMetadata:
    """The step's blocks, as `tree_attention_cpu` takes them."""

    def __init__(
        self,
        blocks: StepBlocks,
        # [B] committed tokens before the first row of the step
        context_len: np.ndarray,
        # [B, max blocks] int32
        block_table: torch.Tensor,
    ) -> None:
        table = blocks.table
        self.all_rows_in_blocks = bool((blocks.line >= 0).all())
        of_requests = blocks.first_row, blocks.num_rows, context_len, blocks.line
        numbers = (np.asarray(values, dtype=np.int64) for values in of_requests)
        trees = table.depth, table.ancestors, table.mask_index
        self.arguments = (block_table, *map(torch.from_numpy, (*numbers, *trees)))


@dataclass
class TreeCPUMetadata(CPUAttentionMetadata):
    """Stock metadata plus the step's blocks (None: every row is causal)."""

    tree: TreeMetadata | None = None


class TreeCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Pins the KV layout that tree attention reads; everything else is stock."""

    isa: str

    def _set_isa_to_layers(self, layer_names: list[str]) -> None:
        if self.isa == "amx":
            self.isa = "vec"
        super()._set_isa_to_layers(layer_names)

    def build(self, *args: Any, **kwargs: Any) -> TreeCPUMetadata:
        return TreeCPUMetadata(**vars(super().build(*args, **kwargs)))


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Registered over CPU_ATTN while a bita model is built."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUMetadataBuilder]:
        return TreeCPUMetadataBuilder


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """One layer: causal rows through the stock kernel, step blocks through tree attention."""

    head_sizes = range(1, 513)
    quantised_caches: tuple[str, ...] = ()
    # Set once after loading: [Hkv, D, P] and [Hkv, P, D], in what the kernel computes in
    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor

    def set_prompt_tokens(
        self,
        # [P, Hkv, D] fp32
        keys: torch.Tensor,
        # [P, Hkv, D] fp32
        values: torch.Tensor,
    ) -> int:
        """Keep the layer's prompt tokens as the kernel reads them; returns their bytes."""
        self.prompt_keys = keys.permute(1, 2, 0).contiguous()
        self.prompt_values = values.transpose(0, 1).contiguous()
        return self.prompt_keys.nbytes + self.prompt_values.nbytes

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As CPUAttentionBackendImpl.forward: query `[rows, Hq, D]`, writes and returns output."""
        tree = None if attn_metadata is None else attn_metadata.tree
        if tree is None or not tree.all_rows_in_blocks:
            # In a mixed step the stock kernel also computes the block rows, causally; they are overwritten.
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if tree is not None:
            # Prompt tokens, committed context and own rows in one softmax.
            torch.ops.bita.tree_attention_cpu(
                query.view(-1, self.num_heads, self.head_size),
                kv_cache,
                *tree.arguments,
                self.prompt_keys,
                self.prompt_values,
                output.view(-1, self.num_heads, self.head_size),
                self.scale,
                self.logits_soft_cap or 0.0,
                self.sliding_window,
                self.sinks,
                getattr(layer, "attention_chunk_size", 0),
            )
        return output

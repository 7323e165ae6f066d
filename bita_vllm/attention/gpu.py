"""GPU attention backend: tree attention for requests with blocks, vLLM's own kernels for all others.

KV layout is stock (vllm/v1/attention/backends/triton_attn.py), and FlashAttention's too (plain.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.tree_attention import Workspace, tree_attention
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.v1.attention.backend import AttentionImplBase, AttentionLayer
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from bita_vllm.attention.gpu_metadata import BlockMetadata, StepMetadata, StepMetadataBuilder
from bita_vllm.step.settings import FP8_CACHES

if TYPE_CHECKING:
    # it does not import everywhere
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from bita_vllm.attention.workspaces import SharedWorkspaces
    from bita_vllm.step.device import StepTrees


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """Registered in place of TRITON_ATTN while a bita model is built."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:  # type: ignore[override]
        return StepMetadataBuilder


class TreeTritonAttentionImpl(TritonAttentionImpl):
    """One layer: tree attention for the rows of blocks, stock for all others."""

    head_sizes = range(16, 257, 16)
    quantised_caches = FP8_CACHES
    # [P, Hkv, D] each, in the model's dtype
    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    config: AttentionConfig
    # shared by all layers of a shape; None: the longest sequence is one split
    workspace: Workspace | None = None
    # for rows of no block; None: Triton
    flash: FlashAttentionImpl | None = None

    def set_prompt_tokens(
        self,
        # [P, Hkv, D]
        keys: torch.Tensor,
        # [P, Hkv, D]
        values: torch.Tensor,
    ) -> int:
        """Keep the layer's prompt tokens; returns their bytes."""
        self.prompt_keys, self.prompt_values = keys.contiguous(), values.contiguous()
        return self.prompt_keys.nbytes + self.prompt_values.nbytes

    def attach(
        self,
        config: AttentionConfig,
        workspaces: SharedWorkspaces,
        flash: FlashAttentionImpl | None,
    ) -> None:
        """Take what depends on the whole engine: the kernel's tiles, shared memory, what plain rows run in."""
        self.config, self.flash = config, flash
        self.workspace = workspaces.of(self)

    def get_impl_variants(self) -> tuple[AttentionImplBase, ...]:
        """Also vLLM's FlashAttention: its metadata builder reads the windows of all layers there."""
        return (self,) if self.flash is None else (self, self.flash)

    def _workspace_for(
        self, num_requests: int, trees: StepTrees, max_seq_len: int
    ) -> Workspace | None:
        """Enough requests fill the machine without splits, in the same bits."""
        if self.workspace is None:
            return None
        rows = num_requests * trees.table.num_rows
        return self.workspace if self.workspace.holds(self.config, rows, max_seq_len) else None

    def fused_output_quant_supported(self, quant_key: QuantKey) -> bool:
        """Tree attention writes the model's dtype; vLLM quantises the output in an operation of its own."""
        return False

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stock, of the backend that plain vLLM would take: both write the same bytes."""
        if self.flash is not None:
            self.flash.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As TritonAttentionImpl.forward: query `[rows, Hq, D]`, writes and returns output."""
        if attn_metadata is None:  # the profile run
            return output.fill_(0)
        plain_query, plain_output = query, output
        if (blocks := attn_metadata.blocks) is not None:
            self._attend_blocks(layer, query, kv_cache, blocks, output)
            if attn_metadata.plain is None:
                return output
            plain_query, plain_output = query[blocks.num_rows :], output[blocks.num_rows :]
        plain: Any = attn_metadata.plain
        # Keys and values are read from the cache.
        given = (layer, plain_query, key, value, kv_cache, plain, plain_output)
        if attn_metadata.in_flash:
            assert self.flash is not None
            self.flash.forward(*given, output_scale, output_block_scale)
        else:
            super().forward(*given, output_scale, output_block_scale)
        return output

    def _attend_blocks(
        self,
        layer: Any,
        # [rows, Hq, D]
        query: torch.Tensor,
        # [num_blocks, Hkv, block_size, 2 * D]
        kv_cache: torch.Tensor,
        blocks: BlockMetadata,
        # Output. [rows, Hq, D]
        output: torch.Tensor,
    ) -> None:
        trees, rows, num_requests = blocks.trees, blocks.num_rows, len(blocks.seq_lens)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales: dict[str, Any] = {}  # one fp32 number each
        if self.kv_cache_dtype in FP8_CACHES:
            caches = (key_cache, value_cache)
            key_cache, value_cache = (cache.view(self.fp8_dtype) for cache in caches)
            scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
            if query.dtype == self.fp8_dtype:  # on CUDA, where vLLM quantises queries, too
                scales["q_scale"] = layer._q_scale
        tree_attention(
            query[:rows],
            key_cache,
            value_cache,
            blocks.block_table,
            blocks.query_start,
            blocks.seq_lens,
            blocks.line,
            trees.table,
            self.prompt_keys,
            self.prompt_values,
            output[:rows].view(rows, self.num_heads, self.head_size),
            scale=self.scale,
            config=self.config,
            max_query_len=blocks.max_query_len,
            max_seq_len=blocks.max_seq_len,
            window=self.sliding_window[0] + 1,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            **scales,
            workspace=self._workspace_for(num_requests, trees, blocks.max_seq_len),
        )

"""CPU attention backend: vLLM's own kernel for causal rows, tree attention in torch for step blocks.

KV cache, slots and writes are stock (vllm/v1/attention/backends/cpu_attn.py): a block's rows lie in
linear slots behind the committed context. Its `vec` layout, which we pin, keeps keys transposed:
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

from bita_vllm.runner.blocks import StepBlocks

NEG_INF = float("-inf")


@dataclass
class BlockGroup:
    """Step blocks of one shape: same number of rows n, same number of KV cache blocks.

    Attributes:
        rows: `[B, n]` int64, rows of the step.
        kv_blocks: `[B * num_kv_blocks]` int64, KV cache blocks of each request.
        context_len: `[B, 1, 1]` int64, committed tokens before the root.
        depth: `[B, n]` int64, depth in the tree.
        seen: `[B, n, n]` bool, row i sees row j of its own block.
        is_mask: `[B, n]` bool, rows that see the prompt tokens.
    """

    rows: torch.Tensor
    kv_blocks: torch.Tensor
    context_len: torch.Tensor
    depth: torch.Tensor
    seen: torch.Tensor
    is_mask: torch.Tensor

    def bias(self, num_slots: int, num_prompt_tokens: int, window: int) -> torch.Tensor:
        """`[B, n, P + num_slots]` fp32: 0 where a row sees a key, -inf elsewhere.

        A sliding window counts positions (tree depths), not slots; -1 is no window.
        Prompt tokens are always within it.
        """
        num_requests, n = self.rows.shape
        slot = torch.arange(num_slots)
        own = slot - self.context_len
        visible = (own < 0).expand(num_requests, n, num_slots).clone()
        # [B, n, n] rows of the block, scattered to the slots where they lie
        at = (self.context_len + torch.arange(n)).expand(num_requests, n, n)
        visible.scatter_(2, at, self.seen)
        if window > 0:
            position = slot.expand(num_requests, 1, num_slots).clone()
            position.scatter_(2, at[:, :1], self.context_len + self.depth[:, None])
            visible &= (self.context_len + self.depth[:, :, None]) - position < window
        prompt = self.is_mask[:, :, None].expand(num_requests, n, num_prompt_tokens)
        bias = torch.zeros(num_requests, n, num_prompt_tokens + num_slots)
        return bias.masked_fill_(~torch.cat([prompt, visible], dim=2), NEG_INF)


class TreeMetadata:
    """The step's blocks, grouped by shape, with the biases that all layers share."""

    def __init__(
        self,
        blocks: StepBlocks,
        # [B] committed tokens before the first row of the step
        context_len: np.ndarray,
        # [B, max blocks] int32
        block_table: torch.Tensor,
        block_size: int,
    ) -> None:
        self.all_rows_in_blocks = bool((blocks.line >= 0).all())
        self.block_size = block_size
        self.groups: list[BlockGroup] = []
        self._biases: dict[tuple[int, int], list[torch.Tensor]] = {}
        table, requests = blocks.table, np.flatnonzero(blocks.line >= 0)
        num_kv_blocks = -(-(context_len + blocks.num_rows) // block_size)
        # Requests of one shape are one batched matmul; KV lengths are rounded up to keep the groups few.
        rounded = np.where(num_kv_blocks > 4, -(-num_kv_blocks // 4) * 4, num_kv_blocks)
        rounded = np.minimum(rounded, block_table.shape[1])
        shapes = np.stack([blocks.num_rows[requests], rounded[requests]], axis=1)
        for n, length in np.unique(shapes, axis=0):
            members = requests[(shapes == (n, length)).all(axis=1)]
            line = blocks.line[members]
            self.groups.append(
                BlockGroup(
                    rows=torch.from_numpy(blocks.first_row[members, None] + np.arange(n)),
                    kv_blocks=block_table[torch.from_numpy(members), :length].flatten().long(),
                    context_len=torch.from_numpy(context_len[members].astype(np.int64))[
                        :, None, None
                    ],
                    depth=torch.from_numpy(table.depth[line, :n].astype(np.int64)),
                    seen=torch.from_numpy(table.ancestors[line, :n, :n]),
                    is_mask=torch.from_numpy(table.mask_index[line, :n] >= 0),
                )
            )

    def biases(self, num_prompt_tokens: int, window: int) -> list[torch.Tensor]:
        """One bias a group, made by the first layer that asks for it."""
        key = (num_prompt_tokens, window)
        if key not in self._biases:
            self._biases[key] = [
                g.bias(len(g.kv_blocks) // len(g.rows) * self.block_size, num_prompt_tokens, window)
                for g in self.groups
            ]
        return self._biases[key]


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
        if self.isa not in ("vec", "vec16"):
            raise RuntimeError(
                f"bita reads vLLM's 'vec' KV cache layout, but this CPU uses '{self.isa}'; run on an x86-64 CPU."
            )
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

    takes_sinks = False
    quantised_caches: tuple[str, ...] = ()
    # Set once after loading: [Hkv, D, P] and [Hkv, P, D], fp32
    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor

    def set_prompt_tokens(
        self,
        # [P, Hkv, D] fp32
        keys: torch.Tensor,
        # [P, Hkv, D] fp32
        values: torch.Tensor,
    ) -> int:
        """Keep the layer's prompt tokens as the matmuls read them; returns their bytes."""
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
            out = output.view(-1, self.num_heads, self.head_size)
            biases = tree.biases(self.prompt_keys.shape[2], self.sliding_window)
            for group, bias in zip(tree.groups, biases, strict=True):
                self._attend(query, kv_cache, group, bias, out)
        return output

    def _attend(
        self,
        # [rows, Hq, D]
        query: torch.Tensor,
        # [num_blocks, Hkv, block_size, 2 * D], stock's storage
        kv_cache: torch.Tensor,
        group: BlockGroup,
        # [B, n, P + slots]
        bias: torch.Tensor,
        # [rows, Hq, D]
        out: torch.Tensor,
    ) -> None:
        """Tree attention of one group in fp32: prompt tokens, committed context and own rows in one softmax.

        Query heads of a KV head are packed with the rows into one matmul, so K/V are read once a KV head.
        """
        (num_requests, n), heads, dim = group.rows.shape, self.num_kv_heads, self.head_size
        per_kv_head = self.num_queries_per_kv
        packed, num_prompt_tokens = per_kv_head * n, self.prompt_keys.shape[2]
        q = query.view(-1, heads, per_kv_head, dim)[group.rows].permute(0, 2, 3, 1, 4)
        q = q.reshape(num_requests, heads, packed, dim).float() * self.scale
        # [B, KV blocks, Hkv, D, block_size] and [B, KV blocks, Hkv, block_size, D]
        keys, values = self._pages(kv_cache, group.kv_blocks, num_requests)
        context = torch.matmul(q[:, None], keys).permute(0, 2, 3, 1, 4)
        num_kv_blocks, block_size = context.shape[3:]
        scores = torch.cat([torch.matmul(q, self.prompt_keys), context.flatten(3)], dim=3)
        if self.logits_soft_cap:
            scores = torch.tanh(scores / self.logits_soft_cap) * self.logits_soft_cap
        scores.view(num_requests, -1, n, scores.shape[3]).add_(bias[:, None])
        weights = scores.softmax(dim=-1)
        context = weights[..., num_prompt_tokens:].unflatten(3, (num_kv_blocks, block_size))
        attended = torch.matmul(context.permute(0, 3, 1, 2, 4), values).sum(dim=1)
        attended += torch.matmul(weights[..., :num_prompt_tokens], self.prompt_values)
        attended = attended.view(num_requests, heads, per_kv_head, n, dim).permute(0, 3, 1, 2, 4)
        out[group.rows] = attended.reshape(num_requests, n, -1, dim).to(out.dtype)

    def _pages(
        self,
        # [num_blocks, Hkv, block_size, 2 * D]
        kv_cache: torch.Tensor,
        # [B * KV blocks]
        kv_blocks: torch.Tensor,
        num_requests: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[B, KV blocks, Hkv, D, block_size]` and values `[B, KV blocks, Hkv, block_size, D]`, fp32."""
        num_blocks, heads, block_size, _ = kv_cache.shape
        pages = kv_cache.view(num_blocks, -1).index_select(0, kv_blocks).float()
        pages = pages.view(num_requests, -1, heads, 2, block_size * self.head_size)
        keys = pages[:, :, :, 0].unflatten(3, (self.head_size, block_size))
        return keys, pages[:, :, :, 1].unflatten(3, (block_size, self.head_size))


def move_rows(
    kv_caches: list[torch.Tensor],
    head_size: int,
    # [M] slots: block * block_size + offset
    source: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Move accepted rows to their slots in every layer; reads come before writes, so moves may overlap."""
    for kv_cache in kv_caches:
        num_blocks, heads, block_size, _ = kv_cache.shape
        pages = kv_cache.view(num_blocks, heads, 2, -1)
        keys = pages[:, :, 0].view(num_blocks, heads, head_size, block_size)
        values = pages[:, :, 1].view(num_blocks, heads, block_size, head_size)
        from_block, from_offset = source // block_size, source % block_size
        to_block, to_offset = target // block_size, target % block_size
        keys[to_block, :, :, to_offset] = keys[from_block, :, :, from_offset]
        values[to_block, :, to_offset] = values[from_block, :, from_offset]

"""Attention metadata of a step on the GPU: requests with blocks, then what plain vLLM would make of the others.

vLLM sorts the requests of a step so that those with drafts come first (`sort_batch_req_ids` in
vllm/v1/worker/gpu/model_runner.py, the same in 0.32 and 0.33), so one number splits a step. Blocks go to tree
attention. Prefill chunks and plain decoding get the metadata of vLLM's own builder, as if they were the whole step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

if TYPE_CHECKING:  # it does not import everywhere
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from bita_vllm.step.device import StepTrees

ALIGNED = 4  # int32 numbers in 16 bytes


@dataclass
class BlockMetadata:
    """Requests of a step that have blocks, for tree attention.

    Attributes:
        num_rows: rows of all blocks, the first ones of the step.
        max_query_len: rows of the longest block.
        max_seq_len: upper bound of `seq_lens`.
        query_start: `[B + 1]` int32. seq_lens: `[B]` int32. block_table: `[B, max blocks]` int32.
        trees: the templates, and `line`, `[B]` int32 of theirs, what each block has; see `take`.
    """

    num_rows: int
    max_query_len: int
    max_seq_len: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    trees: StepTrees = field(init=False)
    line: torch.Tensor = field(init=False)

    def take(self, trees: StepTrees) -> None:
        """The lines of the blocks, from a persistent buffer: graphs read it."""
        self.trees, self.line = trees, trees.line[: len(self.seq_lens)]


@dataclass
class StepMetadata:
    """A step's attention.

    Attributes:
        blocks: None if no request has one.
        plain: vLLM's own, for all other requests; None if there are none.
        in_flash: whether `plain` is FlashAttention's, not Triton's.
        may_have_mask_rows: whether a row of the step, or of a replay of the graph that it captures, is a mask row.
    """

    blocks: BlockMetadata | None
    plain: TritonAttentionMetadata | FlashAttentionMetadata | None
    in_flash: bool
    may_have_mask_rows: bool = False


@dataclass
class PlainRequests:
    """Requests of a step that come after those with blocks.

    The tensors are copies, as slices of vLLM's may begin anywhere, and Triton compiles a kernel once more for
    pointers that are not a multiple of 16 bytes.

    Attributes:
        max_query_len: rows of the longest. max_seq_len: upper bound of `seq_lens`.
        query_start: `[B + 1]` int32, from 0. seq_lens: `[B]` int32.
    """

    max_query_len: int
    max_seq_len: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor


@dataclass
class StepSplit(ModelSpecificAttnMetadata):
    """Where a step splits, found once for all KV cache groups; vLLM hands it to every metadata builder.

    Attributes:
        num_blocks: requests that have one.
        num_rows: rows of all blocks.
        max_query_len, max_seq_len: of the requests with blocks; 0 if there are none.
        plain: None if every request has a block, or none has.
    """

    num_blocks: int
    num_rows: int
    max_query_len: int
    max_seq_len: int
    plain: PlainRequests | None

    @classmethod
    def of(cls, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode) -> StepSplit:
        """The split of a step. A FULL graph of blocks pads with requests of no rows, which count as blocks."""
        drafts = input_batch.num_draft_tokens_per_req
        if not input_batch.num_draft_tokens or drafts is None:
            return cls(0, 0, 0, 0, None)
        rows, n = input_batch.num_scheduled_tokens, int((drafts > 0).sum())
        assert (drafts[:n] > 0).all(), "vLLM sorts requests with drafts to the front"
        longest = input_batch.seq_lens_cpu_upper_bound.numpy()
        sizes = int(rows[:n].sum()), int(rows[:n].max()), int(longest[:n].max())
        if cudagraph_mode == CUDAGraphMode.FULL:
            return cls(input_batch.num_reqs_after_padding, *sizes, None)
        if n == input_batch.num_reqs:
            return cls(n, *sizes, None)
        starts = input_batch.query_start_loc
        plain = PlainRequests(
            int(rows[n:].max()),
            int(longest[n : input_batch.num_reqs].max()),
            starts[n:] - starts[n],
            input_batch.seq_lens[n:].clone(),
        )
        return cls(n, *sizes, plain)

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"split": self}


NO_BLOCKS = StepSplit(0, 0, 0, 0, None)


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Splits a step; plain requests get what vLLM's FlashAttention builder makes, or its Triton builder.

    FULL graphs hold blocks only, or one plain row a request only: which kernels a mixed step takes is known on the
    host, step by step.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers: Any = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.in_flash = all(layer.impl.flash is not None for layer in layers)
        builder: type[AttentionMetadataBuilder] = TritonAttentionMetadataBuilder
        if self.in_flash:
            from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

            builder = FlashAttentionMetadataBuilder
        # With drafts, vLLM 0.33's Triton backend makes room for queries of several rows, and may split them otherwise.
        without_drafts = copy.copy(vllm_config)
        without_drafts.speculative_config = None
        self.plain = builder(kv_cache_spec, layer_names, without_drafts, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        split: StepSplit = NO_BLOCKS,
    ) -> StepMetadata:
        """Metadata of one KV cache group; without a `split` the step has no blocks."""
        common = common_attn_metadata
        if split.num_blocks == 0:
            plain = self.plain.build(common_prefix_len, common, fast_build)
            return StepMetadata(None, plain, self.in_flash)
        n = split.num_blocks
        blocks = BlockMetadata(
            split.num_rows,
            split.max_query_len,
            split.max_seq_len,
            common.query_start_loc[: n + 1],
            common.seq_lens[:n],
            common.block_table_tensor[:n],
        )
        plain = None
        if split.plain is not None:
            behind = _behind(common, n, split.num_rows, split.plain)
            plain = self.plain.build(common_prefix_len, behind, fast_build)
        return StepMetadata(blocks, plain, self.in_flash)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StepMetadata:
        """A FULL graph: of plain vLLM's if requests have one row each, else of blocks."""
        common = common_attn_metadata
        if common.max_query_len == 1:
            plain = self.plain.build_for_cudagraph_capture(common)
            return StepMetadata(None, plain, self.in_flash)
        common.seq_lens.fill_(1)  # as Triton's builder does: long contexts would only take time
        blocks = BlockMetadata(
            common.num_actual_tokens,
            common.max_query_len,
            common.max_seq_len,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
        )
        return StepMetadata(blocks, None, self.in_flash)


def _behind(
    common: CommonAttentionMetadata, num_blocks: int, num_rows: int, plain: PlainRequests
) -> CommonAttentionMetadata:
    """The step that is left without its first requests."""

    def rest(per_request: Any) -> Any:
        return None if per_request is None else per_request[num_blocks:]

    block_table = common.block_table_tensor[num_blocks:]
    if block_table.stride(0) % ALIGNED:
        block_table = block_table.clone()
    return common.replace(
        query_start_loc=plain.query_start,
        query_start_loc_cpu=common.query_start_loc_cpu[num_blocks:] - num_rows,
        seq_lens=plain.seq_lens,
        num_reqs=common.num_reqs - num_blocks,
        num_actual_tokens=common.num_actual_tokens - num_rows,
        max_query_len=plain.max_query_len,
        max_seq_len=plain.max_seq_len,
        block_table_tensor=block_table,
        slot_mapping=common.slot_mapping[num_rows:],
        positions=None if common.positions is None else common.positions[num_rows:],
        is_prefilling=rest(common.is_prefilling),
        seq_lens_cpu_upper_bound=rest(common.seq_lens_cpu_upper_bound),
        req_idx=rest(common.req_idx),
        rswa_prefix_lens=rest(common.rswa_prefix_lens),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )

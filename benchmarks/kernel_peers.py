"""Other people's kernels for benchmarks/kernel_benchmark.py: what a tree kernel is held to.

Peers know no prompt tokens. What a peer wants in another layout is copied before the clock starts.
FlashAttention 3 is causal, so it is the bound: the same bytes, no tree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_cases import BLOCK_SIZE, Case

# layer -> [B * R, Hq, D]
Run = Callable[[int], torch.Tensor]
FLASH_SPLITS = 32  # vLLM's own bound where it captures FlashAttention 3 (flash_attn_max_num_splits_for_cuda_graph)
FLASHINFER_WORKSPACE = 2**28


class Unavailable(Exception):
    """Why this provider has no row here."""


def need_cuda(case: Case) -> None:
    if case.device.type != "cuda":
        raise Unavailable("needs a CUDA device")


def rows_and_lengths(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B + 1]` and `[B]` int32: where each request's rows begin, and its slots."""
    starts = torch.arange(case.num_requests + 1, dtype=torch.int32, device=case.device)
    lengths = torch.full((case.num_requests,), case.num_slots, dtype=torch.int32)
    return starts * case.num_rows, lengths.to(case.device)


def flash_attention_3(case: Case) -> Run:
    """vLLM's FlashAttention 3, paged and causal, scheduled ahead as plain vLLM does on an H100."""
    need_cuda(case)
    try:
        from vllm.vllm_flash_attn import (
            flash_attn_varlen_func,
            get_scheduler_metadata,
            is_fa_version_supported,
        )
    except ImportError as error:
        raise Unavailable(f"does not import: {error}") from None
    if not is_fa_version_supported(3):
        raise Unavailable("FlashAttention 3 does not run on this GPU, or its library is not there")
    if case.dtype == torch.float32:
        raise Unavailable("has no float32")
    shape, (starts, lengths) = case.shape, rows_and_lengths(case)
    scheduled = get_scheduler_metadata(
        batch_size=case.num_requests,
        max_seqlen_q=case.num_rows,
        max_seqlen_k=case.num_slots,
        num_heads_q=shape.num_q_heads,
        num_heads_kv=shape.num_kv_heads,
        headdim=shape.head_size,
        cache_seqlens=lengths,
        qkv_dtype=case.dtype,
        cu_seqlens_q=starts,
        page_size=BLOCK_SIZE,
        causal=True,
        num_splits=FLASH_SPLITS,
    )
    out = torch.empty_like(case.queries)

    def run(layer: int) -> torch.Tensor:
        keys, values = case.pages(layer)
        flash_attn_varlen_func(
            q=case.queries,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=case.num_rows,
            seqused_k=lengths,
            max_seqlen_k=case.num_slots,
            softmax_scale=case.scale,
            causal=True,
            block_table=case.block_table,
            scheduler_metadata=scheduled,
            num_splits=FLASH_SPLITS,
            fa_version=3,
        )
        return out

    return run


def flashinfer(case: Case) -> Run:
    """FlashInfer's paged kernels: prefill with a custom mask, or decode at R = 1; planned ahead."""
    need_cuda(case)
    try:
        from flashinfer import (
            BatchDecodeWithPagedKVCacheWrapper,
            BatchPrefillWithPagedKVCacheWrapper,
        )
    except ImportError as error:
        raise Unavailable(f"does not import: {error}") from None
    if case.dtype == torch.float32:
        raise Unavailable("has no float32")
    shape, device, rows = case.shape, case.device, case.num_rows
    blocks = case.block_table.shape[1]
    starts, _ = rows_and_lengths(case)
    pages = torch.arange(case.num_requests + 1, dtype=torch.int32, device=device) * blocks
    last = torch.full((case.num_requests,), (case.num_slots - 1) % BLOCK_SIZE + 1)
    table = (pages, case.block_table.flatten(), last.int().to(device))
    sizes = (shape.num_q_heads, shape.num_kv_heads, shape.head_size, BLOCK_SIZE)
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    options = {"sm_scale": case.scale, "q_data_type": case.dtype, "kv_data_type": case.dtype}
    if rows == 1:
        kernel = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        kernel.plan(*table, *sizes, **options)
    else:
        mask = case.visible().flatten().repeat(case.num_requests)
        kernel = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        kernel.plan(starts, *table, *sizes, custom_mask=mask, **options)
    layers = [tuple(x.contiguous() for x in case.pages(i)) for i in range(len(case.caches))]
    return lambda layer: kernel.run(case.queries, layers[layer])


def vllm_qq_bias(case: Case) -> Run:
    """vLLM's `unified_attention` with `qq_bias`: one mask for the whole batch."""
    if case.num_rows == 1:
        raise Unavailable("at R = 1 the same as vllm-causal")
    bias = torch.zeros(case.num_rows, case.num_rows, device=case.device)
    return vllm(case, bias.masked_fill_(~case.ancestors, float("-inf")))


def vllm_causal(case: Case) -> Run:
    """The same kernel without a tree; at R = 1 as plain decoding runs it, split-KV path and all."""
    return vllm(case, None)


def vllm(
    case: Case,
    # [R, R] fp32, added to the scores, or None
    bias: torch.Tensor | None,
) -> Run:
    need_cuda(case)
    try:
        from vllm.v1.attention.backends.triton_attn import (
            MIN_LAUNCH_GRID_SIZE_2D,
            NUM_PAR_SOFTMAX_SEGMENTS,
        )
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        raise Unavailable(f"does not import: {error}") from None
    shape, device = case.shape, case.device
    out = torch.empty_like(case.queries)
    starts, lengths = rows_and_lengths(case)
    descale = torch.ones(1, device=device).expand(case.num_requests, shape.num_kv_heads)
    # Scratch of its split-KV path, sized as TritonAttentionMetadataBuilder does it.
    threshold = MIN_LAUNCH_GRID_SIZE_2D // shape.num_kv_heads
    segments = (threshold, shape.num_q_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    padded = 1 << (shape.head_size - 1).bit_length()

    def run(layer: int) -> torch.Tensor:
        keys, values = case.pages(layer)
        unified_attention(
            q=case.queries,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=case.num_rows,
            seqused_k=lengths,
            max_seqlen_k=case.num_slots,
            softmax_scale=case.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=case.block_table,
            softcap=0,
            q_descale=None,
            k_descale=descale,
            v_descale=descale,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=segment_output,
            softmax_segm_max=segment_max,
            softmax_segm_expsum=segment_sum,
            qq_bias=bias,
        )
        return out

    segment_output = torch.empty(*segments, padded, device=device)
    segment_max, segment_sum = (torch.empty(segments, device=device) for _ in range(2))
    return run


def flex(case: Case) -> Run:
    """FlexAttention, compiled for this very shape; keys and values without pages, its best case."""
    need_cuda(case)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    context, ancestors = case.context, case.ancestors

    def sees(batch, head, row, slot):  # type: ignore[no-untyped-def]
        return (slot < context) | ancestors[row, (slot - context).clamp(min=0)]

    mask = create_block_mask(sees, None, None, case.num_rows, case.num_slots, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    queries = case.queries.unflatten(0, (case.num_requests, case.num_rows)).transpose(1, 2)
    layers = [case.gathered(layer) for layer in range(len(case.caches))]

    def run(layer: int) -> torch.Tensor:
        keys, values = layers[layer]
        attended = compiled(
            queries, keys, values, block_mask=mask, scale=case.scale, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(0, 1)

    return run


def xformers(case: Case) -> Run:
    """xFormers' tree_attention: paged prefix without a mask, tree with one, merged."""
    need_cuda(case)
    try:
        from xformers.ops.fmha import triton_splitk
        from xformers.ops.fmha.attn_bias import (
            BlockDiagonalPaddedKeysMask,
            PagedBlockDiagonalPaddedKeysMask,
        )
        from xformers.ops.tree_attention import tree_attention
    except ImportError as error:
        raise Unavailable(f"does not import: {error}") from None
    shape, requests, rows = case.shape, case.num_requests, case.num_rows
    heads, per_head = shape.num_kv_heads, shape.num_q_heads // shape.num_kv_heads
    queries = case.queries.view(requests, rows, heads, per_head, shape.head_size)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        """`[..., Hkv, D]` -> `[..., Hkv, Hq / Hkv, D]`, nothing copied."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], per_head, shape.head_size)

    layers = []
    for layer in range(len(case.caches)):
        paged = (x.contiguous().flatten(0, 1)[None] for x in case.pages(layer))
        own = (x[:, :, case.context :].transpose(1, 2).contiguous() for x in case.gathered(layer))
        layers.append([grouped(x) for x in (*own, *paged)])
    lengths = [case.context] * requests
    prefix = BlockDiagonalPaddedKeysMask.from_seqlens([rows] * requests, case.num_slots, lengths)
    prefix = prefix.to(case.device).make_paged(
        case.block_table, BLOCK_SIZE, PagedBlockDiagonalPaddedKeysMask
    )
    bias = torch.zeros(rows, rows, dtype=case.dtype, device=case.device)
    bias.masked_fill_(~case.ancestors, float("-inf"))

    def run(layer: int) -> torch.Tensor:
        # Named, as xFormers 0.0.35 raises a TypeError where it chooses for a paged prefix itself.
        operator = triton_splitk.FwOp
        attended = tree_attention(queries, *layers[layer], bias, prefix, prefix_op=operator)
        return attended.reshape(requests * rows, shape.num_q_heads, shape.head_size)

    return run


def sdpa(case: Case) -> Run:
    """torch's scaled_dot_product_attention with a dense mask; keys and values without pages."""
    queries = case.queries.unflatten(0, (case.num_requests, case.num_rows)).transpose(1, 2)
    layers = [case.gathered(layer) for layer in range(len(case.caches))]
    mask = case.visible()

    def run(layer: int) -> torch.Tensor:
        keys, values = layers[layer]
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=case.scale, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(0, 1)

    return run

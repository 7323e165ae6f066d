"""The kernels that benchmarks/kernels.py compares: each turns a case into a function `run(layer) -> output`.

`Unavailable` says why a provider has no row for a case.
Peers know no prompt tokens. What a peer wants in another layout is copied before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.tree_attention import Workspace, tree_attention
from bita_kernels.tree_attention_naive import tree_attention_naive
from bita_kernels.tree_table import TreeTable, packed_bits
from kernel_cases import BLOCK_SIZE, NUM_PROMPT_TOKENS, Case

# layer -> [B * R, Hq, D]
Run = Callable[[int], torch.Tensor]


class Unavailable(Exception):
    """Why this provider has no row here."""


def need_cuda(case: Case) -> None:
    if case.device.type != "cuda":
        raise Unavailable("needs a CUDA device")


def bita(case: Case) -> Run:
    """Our kernel; its splits run side by side where one program a tile would leave the GPU half empty."""
    need_cuda(case)
    config = attention_config(case)
    heads, packed = case.shape.num_kv_heads, case.num_rows * case.group
    programs = case.num_requests * heads * -(-packed // config.block_m)
    workspace = None
    if programs < 2 * torch.cuda.get_device_properties(case.device).multi_processor_count:
        workspace = Workspace.empty(
            config,
            case.num_requests,
            case.num_rows,
            case.shape.num_q_heads,
            case.shape.head_size,
            case.num_slots,
            case.device,
        )
    return with_our_arguments(tree_attention, case, config, workspace)


def naive(case: Case) -> Run:
    """Our kernel's naive twin: plain torch, one request after the other."""
    return with_our_arguments(tree_attention_naive, case, attention_config(case), None)


def attention_config(case: Case) -> AttentionConfig:
    return AttentionConfig.choose(
        case.shape.head_size, case.dtype, case.group, case.num_rows, case.num_slots
    )


def with_our_arguments(
    function: Callable[..., None],
    case: Case,
    config: AttentionConfig,
    workspace: Workspace | None,
) -> Run:
    shape, requests, rows, device = case.shape, case.num_requests, case.num_rows, case.device
    parent = (torch.arange(rows, device=device) - 1) // 2
    depth = case.ancestors.sum(dim=1) - 1
    is_mask = torch.arange(rows, device=device) >= case.num_nodes

    def one_line(column: torch.Tensor) -> torch.Tensor:
        return column[None].int()

    none = torch.full_like(parent, -1)
    table = TreeTable(
        num_depths=torch.zeros(1, dtype=torch.int32, device=device),
        num_nodes=torch.tensor([case.num_nodes], dtype=torch.int32, device=device),
        parent=one_line(parent),
        rank=one_line(none),  # ranks and candidates play no part in attention
        depth=one_line(depth),
        mask_index=one_line(torch.where(is_mask, 0, -1)),
        candidate_rows=none[None, None].int(),
        ancestor_bits=packed_bits(case.ancestors.cpu())[None].to(device),
        max_rank=1,
    )
    generator = torch.Generator(device).manual_seed(1)
    prompt_keys, prompt_values = torch.randn(
        2, NUM_PROMPT_TOKENS, shape.num_kv_heads, shape.head_size,
        generator=generator, device=device, dtype=case.dtype,
    )  # fmt: skip
    query_start = torch.arange(requests + 1, dtype=torch.int32, device=device) * rows
    seq_lens = torch.full((requests,), case.num_slots, dtype=torch.int32, device=device)
    line = torch.zeros_like(seq_lens)
    out = torch.empty_like(case.queries)

    def run(layer: int) -> torch.Tensor:
        keys, values = case.pages(layer)
        function(
            case.queries,
            keys,
            values,
            case.block_table,
            query_start,
            seq_lens,
            line,
            table,
            prompt_keys,
            prompt_values,
            out,
            scale=case.scale,
            config=config,
            max_query_len=rows,
            max_seq_len=case.num_slots,
            workspace=workspace,
        )
        return out

    return run


def vllm_qq_bias(case: Case) -> Run:
    """vLLM's `unified_attention` with `qq_bias`: one mask for the whole batch."""
    if case.num_rows == 1:
        raise Unavailable("at R = 1 the same as vllm-causal")
    bias = torch.zeros(case.num_rows, case.num_rows, device=case.device)
    return vllm(case, bias.masked_fill_(~case.ancestors, float("-inf")))


def vllm_causal(case: Case) -> Run:
    """The same kernel as plain decoding runs it, split-KV path and all."""
    if case.num_rows > 1:
        raise Unavailable("plain decoding: R = 1 only")
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
    starts = torch.arange(case.num_requests + 1, dtype=torch.int32, device=device) * case.num_rows
    lengths = torch.full((case.num_requests,), case.num_slots, dtype=torch.int32, device=device)
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
        attended = tree_attention(queries, *layers[layer], bias, prefix)
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


PROVIDERS: dict[str, Callable[[Case], Run]] = {
    "bita": bita,
    "vllm-qq-bias": vllm_qq_bias,
    "vllm-causal": vllm_causal,
    "flex": flex,
    "xformers": xformers,
    "sdpa": sdpa,
    "naive": naive,
}

"""The kernels that benchmarks/kernel_benchmark.py compares: each turns a case into a function `run(layer) -> output`.

Ours are here, the peers in kernel_peers.py. A provider without a row for a case raises `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import kernel_peers as peers
import torch
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.tree_attention import Workspace, tree_attention
from bita_kernels.tree_attention_naive import tree_attention_naive
from bita_kernels.tree_table import TreeTable, packed_bits
from kernel_cases import BLOCK_SIZE, NUM_PROMPT_TOKENS, Case
from kernel_peers import Run, Unavailable, need_cuda


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
            longest(case),
            case.device,
        )
    return with_our_arguments(tree_attention, case, config, workspace)


def naive(case: Case) -> Run:
    """Our kernel's naive twin: plain torch, one request after the other."""
    if case.device.type == "cuda":
        raise Unavailable("reads the device, which no CUDA graph may")
    return with_our_arguments(tree_attention_naive, case, attention_config(case), None)


def longest(case: Case) -> int:
    """Slots of the longest sequence that the engine may have, which a FULL graph is captured for."""
    return max(case.max_model_len, case.num_slots)


def attention_config(case: Case) -> AttentionConfig:
    """The tiles and splits of an engine that serves `max_model_len`."""
    return AttentionConfig.choose(
        case.shape.head_size,
        case.dtype,
        case.group,
        case.num_rows,
        num_kv_heads=case.shape.num_kv_heads,
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
        num_masks=torch.tensor([rows - case.num_nodes], dtype=torch.int32, device=device),
        parent=one_line(parent),
        rank=one_line(none),  # ranks and candidates play no part in attention
        depth=one_line(depth),
        mask_index=one_line(torch.where(is_mask, 0, -1)),
        candidate_rows=none[None, None].int(),
        ancestor_bits=packed_bits(case.ancestors.cpu())[None].to(device),
        max_rank=1,
        num_ranks=1,
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
    # As wide as an engine's, whose sequences may come to max_model_len.
    blocks = -(-longest(case) // BLOCK_SIZE)
    padding = (0, blocks - case.block_table.shape[1])
    block_table = torch.nn.functional.pad(case.block_table, padding)

    def run(layer: int) -> torch.Tensor:
        keys, values = case.pages(layer)
        function(
            case.queries,
            keys,
            values,
            block_table,
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
            max_seq_len=longest(case),
            workspace=workspace,
        )
        return out

    return run


@dataclass(frozen=True)
class Provider:
    """A kernel of the comparison.

    Attributes:
        make: what prepares a case and returns its `run`.
        causal: its rows see every row before them instead of their ancestors.
        most_cases: cases that one sweep measures at most; 0 for all.
    """

    make: Callable[[Case], Run]
    causal: bool = False
    most_cases: int = 0


PROVIDERS = {
    "bita": Provider(bita),
    "fa3-causal": Provider(peers.flash_attention_3, causal=True),
    "vllm-qq-bias": Provider(peers.vllm_qq_bias),
    "vllm-causal": Provider(peers.vllm_causal, causal=True),
    "flashinfer": Provider(peers.flashinfer),
    "xformers": Provider(peers.xformers),
    "flex": Provider(peers.flex, most_cases=3),  # compiles for every shape: 5 to 20 s each
    "sdpa": Provider(peers.sdpa),
    "naive": Provider(naive),
}

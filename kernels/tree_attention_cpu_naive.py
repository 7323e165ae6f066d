"""Tree attention over vLLM's CPU cache, a request at a time: the twin of `tree_attention_cpu`."""

from __future__ import annotations

import torch


def tree_attention_cpu_naive(
    # [rows, Hq, D]
    query: torch.Tensor,
    # [num_blocks, Hkv, block_size, 2 * D]: keys [D, block_size], then values [block_size, D]
    kv_cache: torch.Tensor,
    # [B, max blocks] int32
    block_table: torch.Tensor,
    # [B] int64, first row of each request in the step
    first_row: torch.Tensor,
    # [B] int64
    num_rows: torch.Tensor,
    # [B] int64, committed tokens before the first row
    context_len: torch.Tensor,
    # [B] int64, line of the template table, -1 for a request without a block: its rows are left alone
    line: torch.Tensor,
    # [lines, R] int32
    depth: torch.Tensor,
    # [lines, R, R] bool, row i sees row j of its own block
    ancestors: torch.Tensor,
    # [lines, R] int32, -1 for node rows; mask rows see the prompt tokens
    mask_index: torch.Tensor,
    # [Hkv, D, P] fp32, or as the cache
    prompt_keys: torch.Tensor,
    # [Hkv, P, D] fp32, or as the cache
    prompt_values: torch.Tensor,
    # [rows, Hq, D], written
    out: torch.Tensor,
    scale: float,
    # 0 for none
    softcap: float,
    # positions, not slots; below 1 for none
    window: int,
    # [Hq] any float type, logits of attention sinks, which have no value
    sinks: torch.Tensor | None = None,
    # positions of a chunk, which a row does not look beyond, as in Llama 4; 0 for none
    chunk: int = 0,
) -> None:
    """Write the attention of every row of a block over prompt tokens, committed context and own rows, in fp32.

    All three and the sink are in one softmax. Window and chunk do not apply to prompt tokens, and neither scale nor
    soft cap to sinks.
    """
    (num_blocks, heads, block_size, _), dim = kv_cache.shape, query.shape[2]
    pages = kv_cache.view(num_blocks, heads, 2, block_size * dim)
    for b in torch.nonzero(line >= 0).flatten().tolist():
        of, n, c = int(line[b]), int(num_rows[b]), int(context_len[b])
        rows = slice(int(first_row[b]), int(first_row[b]) + n)
        used = pages[block_table[b, : -(-(c + n) // block_size)].long()].float()
        # [Hkv, D, slots] and [Hkv, slots, D]
        keys = used[:, :, 0].unflatten(2, (dim, block_size)).permute(1, 2, 0, 3).flatten(2)
        values = used[:, :, 1].unflatten(2, (block_size, dim)).transpose(0, 1).flatten(1, 2)
        # [Hkv, group, n, D]
        q = query[rows].unflatten(1, (heads, -1)).permute(1, 2, 0, 3).float() * scale
        scores = q @ torch.cat([prompt_keys, keys[:, :, : c + n]], dim=2)[:, None]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        own = depth[of, :n].long()
        visible = torch.cat([torch.ones(n, c, dtype=torch.bool), ancestors[of, :n, :n]], dim=1)
        row_positions, positions = (c + own)[:, None], torch.cat([torch.arange(c), c + own])
        if window > 0:
            visible &= row_positions - positions < window
        if chunk > 0:
            visible &= row_positions // chunk == positions // chunk
        prompt = (mask_index[of, :n, None] >= 0).expand(n, prompt_keys.shape[2])
        scores.masked_fill_(~torch.cat([prompt, visible], dim=1), float("-inf"))
        all_values = torch.cat([prompt_values, values[:, : c + n]], dim=1)[:, None]
        if sinks is not None:
            sink = sinks.float().view(heads, -1, 1, 1)
            scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=3)
        chances = scores.softmax(dim=-1)[..., : all_values.shape[2]]
        out[rows] = (chances @ all_values).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)

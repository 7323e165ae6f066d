"""The naive twin of `tree_attention`: its specification, in plain torch."""

from __future__ import annotations

import math

import torch

from .tree_table import TreeTable


def tree_attention_naive(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    line: torch.Tensor,
    table: TreeTable,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    config: object = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: object = None,
) -> None:
    """The specification of `tree_attention`: the same arguments, one request after the other.

    Computes in the dtype of `out` (float64, too). What only steers the launch is not used.
    """
    del config, max_query_len, max_seq_len, workspace
    dtype, group = out.dtype, query.shape[1] // key_cache.shape[2]
    query = query.to(dtype) if q_scale is None else query.to(dtype) * q_scale.to(dtype)
    block_size, num_prompt = key_cache.shape[1], len(prompt_keys)
    for request in range(len(line)):
        start, end = query_start[request : request + 2].tolist()
        n, own_line = end - start, int(line[request])
        if n == 0:
            continue
        context_len = int(seq_lens[request]) - n
        slots = torch.arange(context_len + n, device=query.device)
        pages = block_table[request, slots // block_size].long(), slots % block_size
        keys, values = key_cache[pages].to(dtype), value_cache[pages].to(dtype)
        if k_scale is not None and v_scale is not None:
            keys, values = keys * k_scale.to(dtype), values * v_scale.to(dtype)
        rows = torch.arange(n, device=query.device)
        if own_line < 0:
            depth, own, is_mask = rows, rows[:, None] >= rows, rows < 0
        else:
            depth = table.depth[own_line, :n]
            bits = table.ancestor_bits[own_line, :n][:, rows // 32]
            own, is_mask = (bits >> (rows % 32)) & 1 > 0, table.mask_index[own_line, :n] >= 0
        visible = torch.cat([own.new_ones(n, context_len), own], dim=1)
        if window:
            position = torch.cat([slots[:context_len], context_len + depth])
            visible &= (context_len + depth)[:, None] - position < window
        visible = torch.cat([is_mask[:, None].expand(n, num_prompt), visible], dim=1)
        # [Hq, n, P + slots]
        keys = torch.cat([prompt_keys.to(dtype), keys]).repeat_interleave(group, dim=1)
        values = torch.cat([prompt_values.to(dtype), values]).repeat_interleave(group, dim=1)
        logits = torch.einsum("nhd,shd->hns", query[start:end], keys) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(-1, n, 1)], dim=2)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        # Padding rows without context see nothing: zero, not NaN.
        weights = logits.softmax(dim=2).nan_to_num(0.0)
        out[start:end] = torch.einsum("hns,shd->nhd", weights, values).to(out.dtype)

"""Low-rank deltas of a linear layer, for a step's mask rows only.

A layer that vLLM fuses from several (q, k, v) has a delta of its own for each part: their A's are stacked,
and each part's columns of the output take the product of its B with its own rank-many low values.
"""

from __future__ import annotations

import torch


def add_mask_lora_naive(
    # [rows, out], changed in place
    output: torch.Tensor,
    # [rows, in]
    x: torch.Tensor,
    # [parts * rank, in]
    lora_a: torch.Tensor,
    # [out, rank], the scale folded in
    lora_b: torch.Tensor,
    # [parts, 2] int32, first column of each part in the output, and the one after its last
    parts: torch.Tensor,
    # [capacity] int64, rows of the step that are mask rows, in front
    mask_rows: torch.Tensor,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor,
    # [2, row tiles] int32: with these the kernel's programs wait for each other, and nothing does here
    arrivals: torch.Tensor | None = None,
) -> None:
    """`output[r, columns of part p] += B_p A_p x[r]` for every mask row r; other rows are not touched.

    The specification of `add_mask_lora`: the same arguments.
    """
    num = int(num_mask_rows)
    if num == 0:
        return
    rows, rank = mask_rows[:num], lora_b.shape[1]
    low = x.index_select(0, rows) @ lora_a.T
    changed = output.index_select(0, rows)
    for part, (first, end) in enumerate(parts.tolist()):
        of_part = low[:, part * rank : (part + 1) * rank]
        changed[:, first:end].addmm_(of_part, lora_b[first:end].T)
    output.index_copy_(0, rows, changed)

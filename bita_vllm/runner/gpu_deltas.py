"""Low-rank deltas on a GPU: the operation that the wrapped linear layers call, and what it reads of each step."""

from __future__ import annotations

import torch
from bita_kernels.add_mask_lora import add_mask_lora, make_arrivals
from vllm.forward_context import get_forward_context

from bita_vllm.runner.delta_layers import opaque_operation
from bita_vllm.step.mask_rows import MaskRows


class CountedMaskRows(MaskRows):
    """The mask rows of a step, and the counts with which the programs of a launch wait for each other."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """As MaskRows.buffers, with counts of the layer's own: zeros between launches.

        Launches of two layers may overlap, so layers do not share them: vLLM runs shared experts on a stream of
        their own, while the router runs (vllm/model_executor/layers/fused_moe/runner/shared_experts.py).
        """
        arrivals = make_arrivals(len(self.rows), self.rows.device)
        return super().buffers() | {"mask_row_arrivals": arrivals}


def _add_mask_lora_to_blocks(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    parts: torch.Tensor,
    mask_rows: torch.Tensor,
    num_mask_rows: torch.Tensor,
    arrivals: torch.Tensor,
) -> None:
    """As add_mask_lora, but nothing is launched where the host knows that there are none (prefill)."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict) and not next(iter(metadata.values())).may_have_mask_rows:
        return
    add_mask_lora(output, x, lora_a, lora_b, parts, mask_rows, num_mask_rows, arrivals)


# For the compiler only `output` changes: the counts are what they were.
add_mask_lora_to_blocks = opaque_operation("add_mask_lora_gpu", _add_mask_lora_to_blocks)

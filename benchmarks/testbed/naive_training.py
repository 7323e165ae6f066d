"""Mask groups in training written as plainly as possible: the specification of MaskModel.

One pass over [all tokens | all mask rows], every row with gradient, one dense mask: the paper's
way. Shares no code with bita_vllm.training. The twin in tests, the baseline in benchmarks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel


@dataclass
class Weights:
    """What is trained."""

    mask_embeddings: torch.Tensor  # [k, H]
    prompt_keys: torch.Tensor  # [L, P, Hkv, D]
    prompt_values: torch.Tensor  # [L, P, Hkv, D]
    # module name -> (A [rank, in], B [out, rank], scale)
    deltas: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=dict)


def logits(
    base: PreTrainedModel,
    weights: Weights,
    input_ids: torch.Tensor,  # [B, T]
    roots: torch.Tensor,  # [B, G]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens [B, T, V] and of the mask rows [B, G, k, V]."""
    batch, length = input_ids.shape
    num_groups, k = roots.shape[1], len(weights.mask_embeddings)
    scale = sqrt(base.config.hidden_size) if base.config.model_type == "gemma2" else 1.0
    tokens = base.get_input_embeddings()(input_ids)
    masks = (weights.mask_embeddings * scale).repeat(num_groups, 1).expand(batch, -1, -1)
    embeddings = torch.cat([tokens, masks.to(tokens.dtype)], dim=1)
    rows = length + num_groups * k
    positions = torch.empty(batch, rows, dtype=torch.long)
    visible = torch.zeros(batch, rows, rows, dtype=torch.bool)
    for b in range(batch):
        positions[b, :length] = torch.arange(length)
        visible[b, :length, :length] = torch.ones(length, length).tril().bool()
        for g in range(num_groups):
            root = int(roots[b, g])
            for j in range(k):
                row = length + g * k + j
                positions[b, row] = root + 1 + j
                visible[b, row, : root + 1] = True
                visible[b, row, row - j : row + 1] = True
    is_mask = torch.arange(rows) >= length
    with _naive_base(base, weights, is_mask):
        output = base(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=visible[:, None],
            use_cache=False,
            naive_prompt=(weights.prompt_keys, weights.prompt_values),
            naive_rows=(visible, positions, is_mask),
        ).logits
    return output[:, :length], output[:, length:].unflatten(1, (num_groups, k))


def loss(
    token_logits: torch.Tensor,  # [B, T, V]
    mask_logits: torch.Tensor,  # [B, G, k, V]
    roots: torch.Tensor,  # [B, G]
    targets: torch.Tensor,  # [B, G, k], -100 for none
    row_weights: torch.Tensor,  # [k]
    distill: float,
    reach_power: float = 0.0,
) -> torch.Tensor:
    """Weighted mean over rows of chance ** reach_power * ((1 - distill) * CE + distill * KL)."""
    b, g, j = (targets != -100).nonzero(as_tuple=True)
    wide = torch.promote_types(mask_logits.dtype, torch.float32)  # half precision is widened
    rows = mask_logits[b, g, j].to(wide).log_softmax(-1)
    own = token_logits[b, roots[b, g] + 1 + j].detach().to(wide).log_softmax(-1)
    cross_entropy = F.nll_loss(rows, targets[b, g, j], reduction="none")
    divergence = (own.exp() * (own - rows)).sum(-1)
    losses = (1 - distill) * cross_entropy + distill * divergence
    chance = torch.ones(targets.shape, dtype=rows.dtype)
    chance[b, g, j] = (-cross_entropy.detach()).exp()
    counts = chance.cumprod(dim=2)[b, g, j] ** reach_power
    return (row_weights[j] * counts * losses).sum() / row_weights[j].sum()


def attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, Hq, rows, D]
    key: torch.Tensor,  # [B, Hkv, rows, D]
    value: torch.Tensor,  # [B, Hkv, rows, D]
    attention_mask: torch.Tensor | None,
    scaling: float,
    naive_prompt: tuple[torch.Tensor, torch.Tensor],
    naive_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Textbook attention over [prompt tokens | rows]."""
    visible, positions, is_mask = naive_rows
    batch = len(query)
    if sliding_window:
        visible = visible & (positions[:, :, None] - positions[:, None] < sliding_window)
    prompt_keys, prompt_values = (
        part[int(module.layer_idx)].to(key.dtype) for part in naive_prompt
    )
    key = torch.cat([prompt_keys.transpose(0, 1).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([prompt_values.transpose(0, 1).expand(batch, -1, -1, -1), value], dim=2)
    sees_prompt = is_mask[:, None].expand(batch, -1, len(prompt_keys))
    visible = torch.cat([sees_prompt, visible], dim=2)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if softcap is None and s_aux is None:
        mask = visible[:, None]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return output.transpose(1, 2), None
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if s_aux is not None:  # a key with a value of zero, for every row
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=3)
        value = torch.cat([value, torch.zeros_like(value[:, :, :1])], dim=2)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("naive_training", attention)


class DeltaLinear(nn.Module):
    """A linear layer with a low-rank delta on mask rows."""

    def __init__(self, linear, a, b, scale, is_mask) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale, self.is_mask = linear, a, b, scale, is_mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, rows, in] -> [B, rows, out]; OPT hands over [B * rows, in]"""
        low = F.linear(x, self.a.to(x.dtype))
        delta = self.scale * F.linear(low, self.b.to(x.dtype))
        on = self.is_mask.repeat(x.shape[0] // len(self.is_mask)) if x.dim() == 2 else self.is_mask
        return self.linear(x) + delta * on[:, None].to(x.dtype)


@contextmanager
def _naive_base(base: PreTrainedModel, weights: Weights, is_mask: torch.Tensor) -> Iterator[None]:
    originals = {name: base.get_submodule(name) for name in weights.deltas}
    before = base.config._attn_implementation
    base.set_attn_implementation("naive_training")
    for name, (a, b, scale) in weights.deltas.items():
        base.set_submodule(name, DeltaLinear(originals[name], a, b, scale, is_mask))
    try:
        yield
    finally:
        for name, module in originals.items():
            base.set_submodule(name, module)
        base.set_attn_implementation(before)

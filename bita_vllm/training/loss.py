"""What mask rows are trained to: the text's own token, and the base model's own distribution.

    loss of a row of Mj = w_j * r_j * ((1 - distill) * CE(token at p+1+j) + distill * KL(base || mask))

where the base's distribution for that position is its own, one token earlier (position p+j), and r_j says how much
of the accepted length may come from that row: (c_1 ... c_j) ** reach_power, c_i the probability that Mi gives to the
text's token, without gradient. KL alone spends most of its slope on tokens that no mask will ever guess, and on rows
after them; with power 1 the slope of CE is that of the accepted length of sampled chains, c_1 + c_1 c_2 + ..., cut
off after the row (compare LK losses, arXiv 2602.23881, and generalised cross-entropy, arXiv 1805.07836).
Logits are as wide as the vocabulary, so they exist for one chunk of rows at a time: the gradient at
the rows' hidden states is taken chunk by chunk in the forward pass and only kept, scaled, for the
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bita_vllm.training.batches import IGNORED, MaskBatch
from bita_vllm.training.mask_attention import at_least_float32
from bita_vllm.training.mask_model import Context, MaskModel


@dataclass(frozen=True)
class LossResult:
    """Sums over rows, so that batches and processes add up."""

    loss: torch.Tensor  # scalar with gradient: weighted sum over rows / `weight_sum`
    statistics: torch.Tensor  # [4, k], no gradient

    @property
    def cross_entropy(self) -> torch.Tensor:
        """`[k]`, summed over rows, nats."""
        return self.statistics[0]

    @property
    def divergence(self) -> torch.Tensor:
        """`[k]`, KL summed over rows, nats; zeros without distillation."""
        return self.statistics[1]

    @property
    def correct(self) -> torch.Tensor:
        """`[k]` rows whose best token is the text's."""
        return self.statistics[2]

    @property
    def count(self) -> torch.Tensor:
        """`[k]` rows with a target."""
        return self.statistics[3]


def mask_weights(num_masks: int, decay: float) -> torch.Tensor:
    """`[k]` weights decay^(j-1) of the masks."""
    return decay ** torch.arange(num_masks, dtype=torch.float32)


def mask_loss(
    model: MaskModel,
    context: Context,
    # [B, G, k, H]
    hidden: torch.Tensor,
    batch: MaskBatch,
    # [k]
    weights: torch.Tensor,
    weight_sum: float,
    distill: float,
    reach_power: float,
    chunk_rows: int,
) -> LossResult:
    """Loss and statistics of a batch; `distill` in 0..1 is the share of KL against CE, `reach_power` 0 or more."""
    sequences, groups, num_masks = hidden.shape[:3]
    valid = batch.targets != IGNORED  # [B, G, k]
    sequence, group, place = valid.nonzero(as_tuple=True)  # each [rows]
    # Base and masks of one place in the text lie side by side, so a chunk needs few base rows; and a group's masks
    # come in their order, so what a row counts is known when it is reached.
    length = context.hidden.shape[1]
    teacher_place = sequence * length + batch.roots[sequence, group] + place + 1
    order = teacher_place.argsort(stable=True)
    sequence, group, place = sequence[order], group[order], place[order]
    statistics = at_least_float32(hidden.new_zeros(4, num_masks))
    log_chances = statistics.new_zeros(sequences * groups, num_masks)
    loss = _ChunkedLoss.apply(
        hidden[sequence, group, place],
        model,
        context.hidden.flatten(0, 1),
        teacher_place[order],
        batch.targets[sequence, group, place],
        sequence * groups + group,
        place,
        weights.to(hidden.device) / weight_sum,
        distill,
        reach_power,
        chunk_rows,
        log_chances,
        statistics,
    )
    return LossResult(loss, statistics)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        rows: torch.Tensor,  # [rows, H]
        model: MaskModel,
        base_hidden: torch.Tensor,  # [B*T, H]
        teacher: torch.Tensor,  # [rows], ascending indices into base_hidden
        targets: torch.Tensor,  # [rows]
        group: torch.Tensor,  # [rows], a line of `log_chances`
        place: torch.Tensor,  # [rows], mask index from 0
        weights: torch.Tensor,  # [k]
        distill: float,
        reach_power: float,
        chunk_rows: int,
        log_chances: torch.Tensor,  # [B*G, k], of the text's tokens; written
        statistics: torch.Tensor,  # [4, k], added to
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=statistics.dtype, device=rows.device)
        grad = torch.empty_like(rows)
        for start in range(0, len(rows), chunk_rows):
            part = slice(start, start + chunk_rows)
            target = targets[part]
            with torch.enable_grad():
                chunk = rows[part].detach().requires_grad_()
                scores = at_least_float32(model.logits(chunk))
            correct = (scores.detach().argmax(dim=-1) == target).float()
            log_probs = scores.detach().log_softmax(dim=-1)
            cross_entropy = F.nll_loss(log_probs, target, reduction="none")
            log_chances[group[part], place[part]] = -cross_entropy
            reach = log_chances.cumsum(dim=1)[group[part], place[part]]
            row_weights = weights[place[part]] * (reach_power * reach).exp()
            divergence = torch.zeros_like(cross_entropy)
            if distill > 0:
                base, negative_entropy = _base_probs(model, base_hidden, teacher[part])
                divergence = negative_entropy - (base * log_probs).sum(dim=-1)
            total += (((1 - distill) * cross_entropy + distill * divergence) * row_weights).sum()
            # Slope of both terms at the scores: the mask's probabilities less those it is to have.
            slope = log_probs.exp_()
            slope[torch.arange(len(target), device=target.device), target] -= 1 - distill
            if distill > 0:
                slope.sub_(base, alpha=distill)
            (grad[part],) = torch.autograd.grad(scores, chunk, slope.mul_(row_weights[:, None]))
            for line, values in enumerate(
                (cross_entropy, divergence, correct, torch.ones_like(correct))
            ):
                statistics[line].index_add_(0, place[part], values.to(statistics.dtype))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def, override]
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, *([None] * 12)


def _base_probs(
    model: MaskModel,
    base_hidden: torch.Tensor,  # [B*T, H]
    teacher: torch.Tensor,  # [rows]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's distribution for each row: `[rows, V]`, and its negative entropy `[rows]`, nats."""
    distinct, index = teacher.unique(return_inverse=True)
    log_probs = at_least_float32(model.logits(base_hidden[distinct])).log_softmax(dim=-1)
    probs = log_probs.exp()
    negative_entropy = log_probs.mul_(probs).sum(dim=-1)
    return probs[index], negative_entropy[index]

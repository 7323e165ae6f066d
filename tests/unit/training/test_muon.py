"""Muon: every direction of a matrix moves alike, as far as AdamW would move its numbers."""

import math

import pytest
import torch
from torch import nn

from bita_vllm.training.muon import ADAMW_SIZE, Muon, orthogonalised

SHAPES = [(8, 40), (40, 8), (16, 16), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrices = (
        torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    )
    found = orthogonalised(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ found @ vh.mT  # diagonal if the singular vectors are the same
    values = inside.diagonal(dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(values), atol=1e-8)
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_matrix_without_gradient_does_not_move():
    assert torch.equal(orthogonalised(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_step_is_as_large_as_one_of_adamw(shape):
    """Root mean square 0.2 of the learning rate for a matrix of full rank whose shorter side is the rank."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = Muon([weight])
    optimizer.param_groups[0]["lr"] = 1e-2
    before = weight.detach().clone()
    weight.grad = torch.randn(shape) * 1e-4
    optimizer.step()
    moved = (weight.detach() - before).square().mean().sqrt()
    # Singular values lie between 0.7 and 1.2.
    assert moved == pytest.approx(1e-2 * ADAMW_SIZE, rel=0.3)


def test_matrices_of_one_shape_are_stepped_as_each_alone():
    torch.manual_seed(2)
    weights = [nn.Parameter(torch.randn(4, 9)) for _ in range(3)] + [
        nn.Parameter(torch.randn(9, 4))
    ]
    alone = [nn.Parameter(w.detach().clone()) for w in weights]
    together, each = Muon(weights), [Muon([w]) for w in alone]
    for optimizer in (together, *each):
        optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(3):
        for weight, other in zip(weights, alone, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in (together, *each):
            optimizer.step()
    for weight, other in zip(weights, alone, strict=True):
        assert torch.allclose(weight, other, atol=1e-6)


def test_an_ill_conditioned_product_is_found_in_fewer_steps_than_with_adamw():
    """W = B A of rank 8, singular values from 1 to 1/100."""
    torch.manual_seed(3)
    u = torch.linalg.qr(torch.randn(32, 8)).Q
    v = torch.linalg.qr(torch.randn(24, 8)).Q
    target = u * torch.logspace(0, -2, 8) @ v.T

    def remaining(make, lr, steps=100):
        torch.manual_seed(4)
        a = nn.Parameter(torch.randn(8, 24) / math.sqrt(24))
        b = nn.Parameter(torch.zeros(32, 8))
        optimizer = make([a, b])
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            loss = (b @ a - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((b @ a - target).detach().norm() / target.norm())

    rates = (3e-3, 1e-2, 3e-2, 1e-1)
    muon = min(remaining(Muon, lr) for lr in rates)
    adamw = min(remaining(lambda p: torch.optim.AdamW(p, weight_decay=0.0), lr) for lr in rates)
    print(f"error left: Muon {muon:.4f}, AdamW {adamw:.4f}")
    assert muon < adamw


def test_weight_decay_pulls_towards_zero():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight], weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3, 4), 0.95))

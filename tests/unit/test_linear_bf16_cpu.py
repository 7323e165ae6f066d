"""Linear layers in bfloat16 with deltas: the kernel and its twin against float64, and rows that stay as they are."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bita_kernels import cpu_kernels
from bita_kernels.linear_bf16_cpu_naive import (
    linear_bf16_cpu_naive,
    pack_deltas_bf16,
    pack_linear_bf16,
    unpack_linear_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("two_threads")

KERNELS = ["kernel", "twin"]


def operation(kind):
    assert cpu_kernels.register(), "it must be built here"
    return torch.ops.bita.linear_bf16_cpu if kind == "kernel" else linear_bf16_cpu_naive


def random_layer(num_rows, size_in, size_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_rows, size_in), (size_out, size_in), (size_out,)
    return [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]


def random_deltas(size_in, size_out, rank, bounds, seed=1):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.tensor(list(pairwise(bounds)), dtype=torch.int32)
    lora_a = torch.randn(len(parts) * rank, size_in, generator=generator).bfloat16() / 8
    lora_b = torch.zeros(size_out, rank)
    lora_b[bounds[0] : bounds[-1]] = torch.randn(bounds[-1] - bounds[0], rank, generator=generator)
    return lora_a, lora_b.bfloat16(), parts


@pytest.mark.parametrize("kind", KERNELS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    num_rows=st.integers(0, 40),
    half_in=st.integers(1, 300),
    size_out=st.integers(1, 200),
    with_bias=st.booleans(),
)
def test_products_are_those_of_float64(kind, num_rows, half_in, size_out, with_bias):
    x, weight, bias = random_layer(num_rows, 2 * half_in, size_out)
    bias = bias if with_bias else None
    packed = pack_linear_bf16(weight)
    assert torch.equal(unpack_linear_bf16(packed, size_out), weight)
    out = operation(kind)(x, packed, bias, size_out)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == (num_rows, size_out) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4 * (1 + half_in**0.5))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("num_masks", [1, 5, 13, 30])
@pytest.mark.parametrize("rank", [16, 5])
@pytest.mark.parametrize("bounds", [[0, 64, 96, 150], [32, 80], [0, 150]], ids=str)
def test_deltas_are_added_to_mask_rows_and_to_no_other(kind, num_masks, rank, bounds):
    x, weight, bias = random_layer(30, 70, 150)
    lora_a, lora_b, parts = random_deltas(70, 150, rank, bounds)
    rows = torch.full((40,), 29)
    rows[:num_masks] = torch.randperm(30)[:num_masks].sort().values
    deltas = pack_deltas_bf16(lora_a, lora_b, parts)
    packed = pack_linear_bf16(weight)
    without = operation(kind)(x, packed, bias, 150)
    out = operation(kind)(x, packed, bias, 150, *deltas, rows, torch.tensor([num_masks]))
    exact = F.linear(x.double(), weight.double(), bias.double())
    for part, (first, end) in enumerate(parts.tolist()):
        low = x[rows[:num_masks]].double() @ lora_a[part * rank : (part + 1) * rank].double().T
        exact[rows[:num_masks], first:end] += low @ lora_b[first:end].double().T
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=0.05)
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[rows[:num_masks]] = False
    assert torch.equal(out[untouched], without[untouched])
    assert not torch.equal(out[~untouched], without[~untouched])


@pytest.mark.parametrize("size_in", [70, 576, 1536])
def test_a_row_alone_gets_the_same_bits(size_in):
    x, weight, bias = random_layer(100, size_in, 150)
    packed = pack_linear_bf16(weight)
    deltas = pack_deltas_bf16(*random_deltas(size_in, 150, 16, [0, 64, 96, 150]))
    masks = torch.arange(3, 100, 3)
    together = operation("kernel")(x, packed, bias, 150, *deltas, masks, torch.tensor([len(masks)]))
    for first, end in [(0, 1), (3, 4), (4, 6), (7, 11), (20, 28), (30, 43), (50, 75)]:
        own = masks[(masks >= first) & (masks < end)] - first
        rows = x[first:end].contiguous(), packed, bias, 150
        alone = operation("kernel")(*rows, *deltas, own, torch.tensor([len(own)]))
        assert torch.equal(alone, together[first:end])


def test_rows_of_any_shape_and_stride():
    x, weight, _ = random_layer(12, 70, 37)
    packed = pack_linear_bf16(weight)
    flat = operation("kernel")(x, packed, None, 37)
    assert torch.equal(operation("kernel")(x.view(3, 4, 70), packed, None, 37).view(12, 37), flat)
    wide = torch.cat([torch.full_like(x, float("nan")), x], dim=1)[:, 70:]
    assert torch.equal(operation("kernel")(wide, packed, None, 37), flat)


def test_parts_that_share_a_panel_are_not_packed():
    assert pack_deltas_bf16(*random_deltas(8, 64, 4, [0, 24, 64])) is None
    assert pack_deltas_bf16(*random_deltas(8, 64, 4, [0, 24])) is None


def test_what_is_not_packed_is_refused():
    x, weight, _ = random_layer(2, 8, 40)
    packed = pack_linear_bf16(weight)
    for rows, weights in ((x[:, :6], packed), (x.float(), packed), (x, packed.float())):
        with pytest.raises(RuntimeError, match="as pack_linear_bf16 leaves them"):
            operation("kernel")(rows, weights, None, 40)
    deltas = pack_deltas_bf16(*random_deltas(10, 40, 4, [0, 40]))
    with pytest.raises(RuntimeError, match="as pack_deltas_bf16 leaves them"):
        operation("kernel")(x, packed, None, 40, *deltas, torch.tensor([1]), torch.tensor([1]))

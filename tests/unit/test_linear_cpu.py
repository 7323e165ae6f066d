"""Linear layers with packed weights: the kernel against its twin, and the layers of a model that get it."""

import pytest
import torch
import torch.nn.functional as F
import vllm.model_executor.layers.utils as stock
from bita_kernels import cpu_kernels
from bita_kernels.linear_cpu_naive import (
    linear_cpu_naive,
    pack_linear,
    smallest_dtype,
    unpack_linear,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bita_vllm.runner import cpu_linear as linear_cpu

pytestmark = pytest.mark.usefixtures("two_threads")

KERNELS = ["kernel", "twin"]


def operation(kind):
    assert cpu_kernels.register(), "it must be built here"
    return torch.ops.bita.linear_cpu if kind == "kernel" else linear_cpu_naive


def random_layer(num_rows, size_in, size_out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((num_rows, size_in), (size_out, size_in), (size_out,))
    )
    return x, weight.to(dtype).float(), bias


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    num_rows=st.integers(0, 40),
    size_in=st.integers(1, 600),
    size_out=st.integers(1, 100),
    with_bias=st.booleans(),
)
def test_products_are_those_of_float64(kind, dtype, num_rows, size_in, size_out, with_bias):
    x, weight, bias = random_layer(num_rows, size_in, size_out, dtype)
    bias = bias if with_bias else None
    assert smallest_dtype(weight) == dtype
    packed = pack_linear(weight, dtype)
    assert torch.equal(unpack_linear(packed, size_out).float(), weight)
    out = operation(kind)(x, packed, bias, size_out)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == (num_rows, size_out) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5 * (1 + size_in**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size_in", [70, 576, 1536])
def test_a_row_alone_gets_the_same_bits(dtype, size_in):
    """With any number of others next to it, more than stay in a cache too."""
    x, weight, bias = random_layer(300, size_in, 100, dtype)
    packed = pack_linear(weight, dtype)
    together = operation("kernel")(x, packed, bias, 100)
    for first, end in [(0, 1), (1, 3), (7, 10), (20, 24), (30, 35), (40, 46), (50, 57), (100, 260)]:
        alone = operation("kernel")(x[first:end].contiguous(), packed, bias, 100)
        assert torch.equal(alone, together[first:end])


def test_rows_of_any_shape_and_stride():
    x, weight, _ = random_layer(12, 70, 37, torch.float32)
    packed = pack_linear(weight, torch.float32)
    flat = operation("kernel")(x, packed, None, 37)
    assert torch.equal(operation("kernel")(x.view(3, 4, 70), packed, None, 37).view(12, 37), flat)
    wide = torch.cat([torch.full_like(x, float("nan")), x], dim=1)[:, 70:]
    assert torch.equal(operation("kernel")(wide, packed, None, 37), flat)


def test_weights_that_bfloat16_would_round_stay_in_fp32():
    weight = torch.ones(4, 8)
    assert smallest_dtype(weight) == torch.bfloat16
    weight[3, 7] += 2**-20
    assert smallest_dtype(weight) == torch.float32


def test_what_is_not_packed_is_refused():
    with pytest.raises(RuntimeError, match="as pack_linear leaves them"):
        operation("kernel")(torch.ones(2, 8), torch.ones(2, 8, 16), None, 4)
    with pytest.raises(RuntimeError, match="as pack_linear leaves them"):
        operation("kernel")(torch.ones(2, 8), pack_linear(torch.ones(4, 9), torch.float32), None, 4)


def layer(dtype, *shape):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(*shape, dtype=dtype), requires_grad=False)
    return module


@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (40, 8)), (torch.bfloat16, (40, 8)), (torch.float32, (4, 40, 8))],
)
def test_fp32_layers_are_packed_where_that_is_faster(monkeypatch, capability, dtype, shape):
    cpu_kernels.register()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    left_to_vllm = []
    monkeypatch.setattr(
        stock, "dispatch_cpu_unquantized_gemm", lambda module, _: left_to_vllm.append(module)
    )
    modules = [layer(dtype, *shape) for _ in range(2)]
    with linear_cpu.packed_linear_layers():
        for module, remove_weight in zip(modules, (False, True), strict=True):
            stock.dispatch_cpu_unquantized_gemm(module, remove_weight)
    outside = layer(torch.float32, 40, 8)
    stock.dispatch_cpu_unquantized_gemm(outside, True)
    if capability == "AVX2" and dtype == torch.float32 and len(shape) == 2:
        assert left_to_vllm == [outside]
        assert [module.weight.shape for module in modules] == [(40, 8), (0,)]
        for module in modules:
            found = module.cpu_linear(torch.ones(3, 8), module.weight, torch.ones(40))
            assert torch.equal(found, torch.full((3, 40), 9.0))
    else:
        assert left_to_vllm == [*modules, outside]

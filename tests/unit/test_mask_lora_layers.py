"""Deltas in vLLM's linear layers: found by name, sliced for a tensor-parallel rank as vLLM slices weights."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from bita_kernels import cpu_kernels
from bita_kernels.add_mask_lora_cpu_naive import pack_mask_lora
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.models.utils import WeightsMapper

from bita_vllm.adapter.config import AdapterError
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.runner.delta_layers import (
    MaskLoraMethod,
    find_place,
    in_dtype,
    layer_tensors,
    put_in_mask_lora,
)
from bita_vllm.runner.gpu_deltas import CountedMaskRows
from bita_vllm.step.mask_rows import MaskRows

IN, RANK, SCALE = 24, 3, 2.0
ROWS = 6

# kind -> (makes the layer, output features of each module in it, what vLLM's weight loader calls them)
LAYERS = {
    "row": (lambda: linear.RowParallelLinear(IN, 20, bias=False), [20], [None]),
    "column": (lambda: linear.ColumnParallelLinear(IN, 16, bias=False), [16], [None]),
    "replicated": (lambda: linear.ReplicatedLinear(IN, 10, bias=False), [10], [None]),
    "gate_up": (lambda: linear.MergedColumnParallelLinear(IN, [16, 16], bias=False), [16, 16], [0, 1]),
    "gate_up of one module": (lambda: linear.MergedColumnParallelLinear(IN, [16, 8], bias=False), [24], [None]),
    "qkv": (lambda: linear.QKVParallelLinear(IN, 4, 8, 4, bias=False), [32, 16, 16], ["q", "k", "v"]),
    "qkv, fewer KV heads than ranks": (
        lambda: linear.QKVParallelLinear(IN, 4, 8, 2, bias=False), [32, 8, 8], ["q", "k", "v"]),
    "qkv of one module": (lambda: linear.QKVParallelLinear(IN, 4, 8, 2, bias=False), [48], [None]),
}  # fmt: skip


@pytest.fixture
def tensor_parallel(monkeypatch):
    """Call with a rank and a size: layers made from then on are that rank's."""

    def install(rank: int, size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    install(0, 1)
    return install


def pieces_of(outputs, layer) -> list[range]:
    """All of the layer for its only module, else one piece each."""
    if len(outputs) > 1:
        return [range(i, i + 1) for i in range(len(outputs))]
    sizes = layer.output_partition_sizes
    return [range(len(sizes))]


def run(output, x, a, b, parts, rows):
    padded = torch.zeros(len(x) + 1, dtype=torch.int64)
    padded[: len(rows)] = torch.tensor(rows)
    add_mask_lora_naive(output, x, a, b, parts, padded, torch.tensor([len(rows)]))
    return output


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_rank_adds_what_its_share_of_the_weights_would(kind, tp_size, tensor_parallel):
    """vLLM's own loader slices the merged delta, scale * B A, as if it were the layer's weights."""
    make, outputs, shards = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(RANK, IN, generator=generator) for _ in outputs]
    b = [torch.randn(size, RANK, generator=generator) for size in outputs]
    x = torch.randn(ROWS, IN, generator=generator)
    for rank in range(tp_size):
        tensor_parallel(rank, tp_size)
        layer = make()
        for shard, down, up in zip(shards, a, b, strict=True):
            own = () if shard is None else (shard,)
            layer.weight.weight_loader(layer.weight, SCALE * up @ down, *own)
        places = pieces_of(outputs, layer)
        lora_a, lora_b, parts = layer_tensors(layer, list(zip(places, a, b, strict=True)), SCALE)
        local = layer.weight.shape[1]
        own_x = x[:, rank * local : (rank + 1) * local] if kind == "row" else x
        got = run(torch.zeros(ROWS, len(layer.weight)), own_x, lora_a, lora_b, parts, [1, 2, 5])
        expected = own_x @ layer.weight.T
        torch.testing.assert_close(got[[1, 2, 5]], expected[[1, 2, 5]])
        assert not got[[0, 3, 4]].any()


def test_modules_without_a_delta_keep_their_columns(tensor_parallel):
    layer = linear.QKVParallelLinear(IN, 4, 8, 4, bias=False)
    ones = [(range(i, i + 1), torch.ones(RANK, IN), torch.ones(n, RANK)) for i, n in ((0, 32), (2, 16))]  # fmt: skip
    lora_a, lora_b, parts = layer_tensors(layer, ones, SCALE)
    assert lora_a.shape == (2 * RANK, IN) and parts.tolist() == [[0, 32], [48, 64]]
    output = torch.full((2, 64), float("nan"))
    output[:, :32] = output[:, 48:] = 0
    output = run(output, torch.ones(2, IN), lora_a, lora_b, parts, [1])
    assert output[1, :32].eq(SCALE * RANK * IN).all() and output[1, 48:].eq(SCALE * RANK * IN).all()
    assert output[:, 32:48].isnan().all() and not output[0, :32].any()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = linear.QKVParallelLinear(IN, 4, 4, 2, bias=False)
        self.o_proj = linear.RowParallelLinear(16, IN, bias=False)
        self.odd = type("OddLinear", (linear.RowParallelLinear,), {})(IN, IN, bias=False)


class Model(nn.Module):
    """As vLLM's models are: some projections fused, names mapped from transformers'."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "absent": ["x", "y"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"decoder.": "model."},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(), Layer()])
        for weight in self.parameters():
            weight.data.normal_()  # vLLM leaves them as the memory is


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("model.layers.1.q_proj", "model.layers.1.qkv_proj", (IN, 16)),
        ("decoder.layers.0.v_proj", "model.layers.0.qkv_proj", (IN, 8)),
        ("model.layers.0.qkv_proj", "model.layers.0.qkv_proj", (IN, 32)),
        ("model.layers.0.o_proj", "model.layers.0.o_proj", (16, IN)),
    ],
)
def test_modules_are_found_by_transformers_names(tensor_parallel, name, layer, size):
    place = find_place(Model(), name)
    assert place is not None and (place.layer_name, place.size()) == (layer, size)


@pytest.mark.parametrize("name", ["model.layers.2.q_proj", "model.layers.0.x", "lm_head"])
def test_what_the_model_lacks_is_not_found(tensor_parallel, name):
    assert find_place(Model(), name) is None


def test_layers_that_compute_in_their_own_way_are_refused(tensor_parallel):
    with pytest.raises(AdapterError, match=r"layers.0.odd, a OddLinear of vLLM's"):
        find_place(Model(), "model.layers.0.odd")


def weights(**pairs) -> MaskLoraWeights:
    return MaskLoraWeights(RANK, RANK * SCALE, {f"model.layers.0.{n}": p for n, p in pairs.items()})


def test_only_layers_with_a_delta_are_wrapped(tensor_parallel):
    model, rows, calls = Model(), MaskRows(8, torch.device("cpu")), []
    pair = (torch.ones(RANK, 16), torch.ones(IN, RANK))
    add = lambda *arguments: calls.append(arguments)  # noqa: E731
    added = put_in_mask_lora(
        model, weights(o_proj=pair), rows, add, in_dtype(torch.bfloat16), torch.device("cpu")
    )
    assert added == 2 * RANK * (16 + IN)
    first, second = model.model.layers
    assert isinstance(first.o_proj.quant_method, MaskLoraMethod)
    assert not isinstance(first.qkv_proj.quant_method, MaskLoraMethod)
    assert not isinstance(second.o_proj.quant_method, MaskLoraMethod)
    first.o_proj.cpu_linear = nn.functional.linear
    nn.init.ones_(first.o_proj.weight)  # vLLM leaves what lay in memory
    x = torch.randn(4, 16)
    output, _ = first.o_proj(x)
    assert torch.equal(output, nn.functional.linear(x, first.o_proj.weight))
    assert calls[0][0] is output and calls[0][1] is x and calls[0][5] is rows.rows


def test_the_operation_gets_all_that_its_mask_rows_hold(tensor_parallel):
    class Counted(MaskRows):
        def buffers(self):
            return super().buffers() | {"mask_row_arrivals": torch.zeros(3, 1, dtype=torch.int32)}

    model, rows, calls = Model(), Counted(8, torch.device("cpu")), []
    pair = (torch.ones(RANK, 16), torch.ones(IN, RANK))
    add = lambda *arguments: calls.append(arguments)  # noqa: E731
    put_in_mask_lora(
        model, weights(o_proj=pair), rows, add, in_dtype(torch.float32), torch.device("cpu")
    )
    layer = model.model.layers[0].o_proj
    layer.cpu_linear = nn.functional.linear
    layer(torch.zeros(2, 16))
    (arguments,) = calls
    assert arguments[5] is rows.rows and arguments[6] is rows.num
    assert arguments[7] is layer.mask_row_arrivals and len(arguments) == 8


def test_layers_have_counts_of_their_own(tensor_parallel):
    """vLLM runs shared experts on a second stream next to the router: launches of two layers overlap."""
    model, device = Model(), torch.device("cpu")
    pairs = {
        f"model.layers.{i}.o_proj": (torch.ones(RANK, 16), torch.ones(IN, RANK)) for i in (0, 1)
    }
    deltas = MaskLoraWeights(RANK, RANK * SCALE, pairs)
    pack = in_dtype(torch.float32)
    put_in_mask_lora(model, deltas, CountedMaskRows(40, device), lambda *a: None, pack, device)
    first, second = (layer.o_proj for layer in model.model.layers)
    assert first.mask_row_arrivals.shape == (3, 3)
    assert first.mask_row_arrivals.data_ptr() != second.mask_row_arrivals.data_ptr()
    assert first.mask_rows is second.mask_rows, "the rows of the step are the same for all"


def test_a_compiled_layer_reads_the_rows_of_each_step(tensor_parallel):
    cpu_kernels.register()
    add_mask_lora = torch.ops.bita.add_mask_lora_cpu
    model, rows, cpu = Model(), MaskRows(8, torch.device("cpu")), torch.device("cpu")
    layer = model.model.layers[0].o_proj
    layer.cpu_linear = nn.functional.linear
    plain = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16)
    expected = plain(x)
    pair = (torch.randn(RANK, 16), torch.randn(IN, RANK))
    put_in_mask_lora(model, weights(o_proj=pair), rows, add_mask_lora, pack_mask_lora, cpu)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, backend="aot_eager")
    delta = 2 * SCALE * x @ pair[0].T @ pair[1].T
    for own in ([], [1, 3], [0], []):
        rows.set(np.array(own, dtype=np.int64))
        output, others = compiled(x), [row for row in range(4) if row not in own]
        assert torch.equal(output[others], expected[others])
        torch.testing.assert_close(output[own], (expected + delta)[own])


def test_a_delta_of_another_size_is_refused(tensor_parallel):
    pair = (torch.ones(RANK, IN), torch.ones(20, RANK))
    with pytest.raises(AdapterError, match="q_proj from 24 to 20 features, but in Model it goes"):
        put_in_mask_lora(
            Model(),
            weights(q_proj=pair),
            MaskRows(8, torch.device("cpu")),
            lambda *a: None,
            in_dtype(torch.float32),
            torch.device("cpu"),
        )

"""An adapter's low-rank deltas in vLLM's linear layers: added to a step's mask rows, and to no other.

Every parallel linear layer calls `self.quant_method.apply(self, x, bias)`, with weights of any format.
`MaskLoraMethod` takes that place, and adds the delta to what the stock method returns: before a row-parallel
layer sums over ranks, so tensor parallelism slices A and B as vLLM slices its own LoRA (vllm/lora/layers).
What is added goes through one custom operation that torch.compile does not look into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import get_packed_modules_mapping
from vllm.utils.torch_utils import direct_register_custom_op

from bita_vllm.adapter.config import AdapterError
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.step.mask_rows import MaskRows

# (output, x, lora_a, lora_b, parts, *MaskRows.buffers()) -> None: bita_kernels.add_mask_lora
AddMaskLora = Callable[..., None]
# (lora_a, lora_b, parts), fp32 -> lora_a, lora_b as that operation takes them
PackMaskLora = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]

_library = torch.library.Library("bita", "FRAGMENT")

# As all of vLLM's models call them, also those that do not say it.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

_STOCK_LAYERS = (
    ReplicatedLinear,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)


def opaque_operation(name: str, function: AddMaskLora) -> AddMaskLora:
    """`function` as `torch.ops.bita.NAME`, which torch.compile calls and does not look into."""
    direct_register_custom_op(
        name,
        function,
        mutates_args=["output"],
        fake_impl=lambda *arguments: None,
        target_lib=_library,
    )
    return getattr(torch.ops.bita, name)


def in_dtype(dtype: torch.dtype) -> PackMaskLora:
    """A and B as they are, in that dtype."""
    return lambda a, b, parts: (a.to(dtype), b.to(dtype))


class MaskLoraMethod(LinearMethodBase):
    """A layer's linear method, and the layer's delta on top of it.

    Attributes:
        step_names: the layer's buffers that say which rows are mask rows, in the order of `add`'s arguments.
    """

    def __init__(
        self, stock: LinearMethodBase, add: AddMaskLora, step_names: tuple[str, ...]
    ) -> None:
        self.stock = stock
        self.add = add
        self.step_names = step_names

    def __getattr__(self, name: str) -> Any:
        if name == "stock":  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.stock, name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.stock.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.stock.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As LinearMethodBase.apply: x `[rows, in]` (or with one more dimension in front)."""
        output = self.stock.apply(layer, x, bias)
        self.add(
            _flat(output),
            _flat(x),
            layer.mask_lora_a,
            layer.mask_lora_b,
            layer.mask_lora_parts,
            *[getattr(layer, name) for name in self.step_names],
        )
        return output


def _flat(
    # [..., features]
    rows: torch.Tensor,
) -> torch.Tensor:
    return rows if rows.dim() == 2 else rows.view(-1, rows.shape[-1])


@dataclass(frozen=True)
class Piece:
    """Output features of a layer that lie together on every tensor-parallel rank: q, k, v, gate, up.

    Attributes:
        size: of the whole model.
        first, end: this rank's share of them.
    """

    size: int
    first: int
    end: int


def output_pieces(layer: LinearBase) -> list[Piece]:
    """In the order of the layer's outputs.

    Source: QKVParallelLinear, MergedColumnParallelLinear (vllm/model_executor/layers/linear.py).
    """
    if isinstance(layer, QKVParallelLinear):
        sizes = [layer.total_num_heads * layer.head_size]
        sizes += [layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size)]
        kv_rank = layer.tp_rank // layer.num_kv_head_replicas
        ranks = [layer.tp_rank, kv_rank, kv_rank]
    elif isinstance(layer, MergedColumnParallelLinear):
        sizes = list(layer.output_sizes)
        ranks = [layer.tp_rank] * len(sizes)
    elif isinstance(layer, ColumnParallelLinear):
        sizes, ranks = [layer.output_size], [layer.tp_rank]
    else:
        return [Piece(layer.output_size, 0, layer.output_size)]
    local = layer.output_partition_sizes
    return [
        Piece(size, rank * n, rank * n + n)
        for size, rank, n in zip(sizes, ranks, local, strict=True)
    ]


@dataclass(frozen=True)
class Place:
    """Where a module of the base model lies in vLLM's model: some pieces of a linear layer."""

    layer_name: str
    layer: LinearBase
    pieces: range

    def size(self) -> tuple[int, int]:
        """(input features, output features) of the module in the whole model."""
        pieces = output_pieces(self.layer)
        return self.layer.input_size, sum(pieces[i].size for i in self.pieces)


def find_place(model: nn.Module, name: str) -> Place | None:
    """vLLM's place for the module that transformers calls `name`; None if there is no such layer.

    Source: LoRAModelManager and parse_fine_tuned_lora_name (vllm/lora).
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        mapped = mapper.get_rename_mapper().map_name(f"{name}.weight")
        name = name if mapped is None else mapped.removesuffix(".weight")
    parent, _, last = name.rpartition(".")
    for packed, members in (FUSED | get_packed_modules_mapping(model)).items():
        layer = _submodule(model, f"{parent}.{packed}")
        if last in members and len(members) > 1 and layer is not None:
            _refuse_layer(f"{parent}.{packed}", layer, len(members))
            index = members.index(last)
            return Place(f"{parent}.{packed}", layer, range(index, index + 1))
    layer = _submodule(model, name)
    if layer is None:
        return None
    _refuse_layer(name, layer, None)
    return Place(name, layer, range(len(output_pieces(layer))))


def _submodule(model: nn.Module, name: str) -> LinearBase | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, LinearBase) else None


def _refuse_layer(name: str, layer: LinearBase, num_members: int | None) -> None:
    """Raise AdapterError for layers whose outputs lie, or are computed, in a way of their own."""
    if type(layer) not in _STOCK_LAYERS or num_members not in (None, len(output_pieces(layer))):
        raise AdapterError(
            f"bita cannot add low-rank deltas to {name}, a {type(layer).__name__} of vLLM's; use an "
            "adapter without deltas there."
        )


def find_places(model: nn.Module, weights: MaskLoraWeights) -> dict[str, Place]:
    """Return the place of every module that has a delta.

    Raises:
        AdapterError: the deltas are another model's, or a layer cannot take one.
    """
    places: dict[str, Place] = {}

    def size_of(name: str) -> tuple[int, int] | None:
        place = find_place(model, name)
        if place is None:
            return None
        places[name] = place
        return place.size()

    weights.check_fit(size_of, type(model).__name__)
    return places


def put_in_mask_lora(
    model: nn.Module,
    weights: MaskLoraWeights,
    mask_rows: MaskRows,
    add: AddMaskLora,
    pack: PackMaskLora,
    device: torch.device,
) -> int:
    """Wrap every linear layer that has a delta; returns the bytes this rank adds.

    Args:
        mask_rows: of each step, from now on.
        add, pack: the operation that the runner computes with, and how it takes A and B.

    Raises:
        AdapterError: from `find_places`.
    """
    places = find_places(model, weights)
    by_layer: dict[str, list[str]] = {}
    for name, place in places.items():
        by_layer.setdefault(place.layer_name, []).append(name)
    added = 0
    for names in by_layer.values():
        names.sort(key=lambda name: places[name].pieces.start)
        layer = places[names[0]].layer
        a, b, parts = layer_tensors(
            layer, [(places[name].pieces, *weights.modules[name]) for name in names], weights.scale
        )
        a, b = pack(a, b, parts)
        layer.register_buffer("mask_lora_a", a.to(device), persistent=False)
        layer.register_buffer("mask_lora_b", b.to(device), persistent=False)
        layer.register_buffer("mask_lora_parts", parts.to(device), persistent=False)
        of_step = mask_rows.buffers()
        for name, buffer in of_step.items():
            layer.register_buffer(name, buffer, persistent=False)
        layer.quant_method = MaskLoraMethod(layer.quant_method, add, tuple(of_step))
        layer.requires_unquantized_input = True  # the delta reads it too
        added += layer.mask_lora_a.nbytes + layer.mask_lora_b.nbytes
    return added


def layer_tensors(
    layer: LinearBase,
    # of each module in the layer, in the order of its outputs: its pieces, A [rank, in], B [out, rank]
    deltas: list[tuple[range, torch.Tensor, torch.Tensor]],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`lora_a`, `lora_b` and `parts` of this tensor-parallel rank, as `add_mask_lora` takes them.

    lora_a and lora_b are fp32; the scale goes into lora_b.
    """
    pieces = output_pieces(layer)
    ends = np.cumsum([piece.end - piece.first for piece in pieces]).tolist()
    starts = [0, *ends]
    rank = deltas[0][2].shape[1]
    lora_b = torch.zeros(ends[-1], rank, dtype=torch.float32)
    parts = []
    for own, _, b in deltas:
        for i, whole in zip(own, b.float().split([pieces[i].size for i in own]), strict=True):
            lora_b[starts[i] : ends[i]] = scale * whole[pieces[i].first : pieces[i].end]
        parts.append((starts[own.start], ends[own.stop - 1]))
    lora_a = torch.cat([a.float() for _, a, _ in deltas])
    if isinstance(layer, RowParallelLinear):
        n = layer.input_size_per_partition
        lora_a = lora_a[:, layer.tp_rank * n : (layer.tp_rank + 1) * n].contiguous()
    return lora_a, lora_b, torch.tensor(parts, dtype=torch.int32)

"""Low-rank deltas for mask rows only, trainable; as an adapter holds them: bita_vllm/adapter/deltas.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bita_vllm.adapter.config import AdapterError
from bita_vllm.adapter.deltas import MaskLoraWeights, layer_number


class MaskLora(nn.Module):
    """`output += (alpha / rank) * B(A(input))` at chosen linear layers of a base model.

    `enabled` says whether the rows at hand are mask rows.
    """

    def __init__(
        self,
        # module name -> (input features, output features)
        sizes: dict[str, tuple[int, int]],
        rank: int,
        alpha: float,
        seed: int = 0,
    ) -> None:
        """A random, B zero: no delta yet."""
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.module_names = list(sizes)
        self.enabled = True
        generator = torch.Generator().manual_seed(seed)
        self.lora_a = nn.ParameterList(  # each [rank, input features]
            torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            for inputs, _ in sizes.values()
        )
        self.lora_b = nn.ParameterList(  # each [output features, rank]
            torch.zeros(outputs, rank) for _, outputs in sizes.values()
        )

    @classmethod
    def for_model(
        cls,
        base: PreTrainedModel,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> MaskLora:
        """New deltas on the linear layers called `targets` (last part of their names, such as
        q_proj; default: all of the decoder's) in `layers` (default: all). `alpha` defaults to
        `rank`: scale 1. Raises AdapterError if a target or layer does not exist."""
        if rank < 1:
            raise AdapterError(f"The rank of the low-rank deltas must be at least 1, not {rank}.")
        linear = linear_layers(base)
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        numbers = {layer_number(name) for name in linear}
        if unknown := sorted(set(targets or ()) - set(kinds)):
            raise AdapterError(
                f"{type(base).__name__} has no linear layer called {', '.join(unknown)} for "
                f"low-rank deltas; it has {', '.join(kinds)}."
            )
        if outside := sorted(set(layers or ()) - numbers):
            raise AdapterError(
                f"Low-rank deltas were asked for in layer {', '.join(map(str, outside))}, but "
                f"{type(base).__name__} has layers 0..{max(numbers)}."
            )
        sizes = {
            name: size
            for name, size in linear.items()
            if (targets is None or name.rpartition(".")[2] in targets)
            and (layers is None or layer_number(name) in layers)
        }
        return cls(sizes, rank, float(rank if alpha is None else alpha), seed)

    def __str__(self) -> str:
        kinds = sorted({name.rpartition(".")[2] for name in self.module_names})
        layers = sorted({layer_number(name) for name in self.module_names})
        return f"rank {self.rank}, alpha {self.alpha:g}, {','.join(kinds)} in layers {layers}"

    def grow(self, rank: int, seed: int = 0) -> None:
        """A larger rank, the same deltas: what is added to A is random, to B zero.

        Raises AdapterError for a smaller one.
        """
        more = rank - self.rank
        if more < 0:
            raise AdapterError(
                f"The low-rank deltas have rank {self.rank}, but rank {rank} was asked for; give {self.rank} or more, "
                "or cut them first (bita shrink)."
            )
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(self.lora_a, self.lora_b, strict=True):
            new = torch.randn(more, a.shape[1], generator=generator) / math.sqrt(a.shape[1])
            a.data = torch.cat([a.data, new.to(a)])
            b.data = torch.cat([b.data, b.new_zeros(len(b), more)], dim=1)
        self.rank, self.alpha = rank, self.alpha * rank / self.rank

    def attach(self, base: PreTrainedModel) -> None:
        """Add the deltas to the outputs of `base`'s linear layers from now on."""
        for index, name in enumerate(self.module_names):
            base.get_submodule(name).register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def add_delta(
            module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            if not self.enabled:
                return output
            rows = args[0].flatten(0, -2)
            low = F.linear(rows, self.lora_a[index].to(rows.dtype))
            b = self.lora_b[index].to(rows.dtype)
            scale = self.alpha / self.rank
            return torch.addmm(output.flatten(0, -2), low, b.T, alpha=scale).view_as(output)

        return add_delta

    def weights(self, base: PreTrainedModel) -> MaskLoraWeights:
        """The deltas as they stand, on the CPU, as an adapter of `base` holds them."""
        pairs = [
            (a.detach().cpu().clone(), b.detach().cpu().clone())
            for a, b in zip(self.lora_a, self.lora_b, strict=True)
        ]
        return MaskLoraWeights(
            self.rank,
            self.alpha,
            dict(zip(self.module_names, pairs, strict=True)),
            fan_in_fan_out=any(
                isinstance(base.get_submodule(name), Conv1D) for name in self.module_names
            ),
        )

    @classmethod
    def from_weights(cls, weights: MaskLoraWeights, base: PreTrainedModel) -> MaskLora:
        """Trainable (fp32) deltas for `base` from an adapter's. Raises AdapterError if they do not fit."""
        linear = linear_layers(base)
        weights.check_fit(linear.get, type(base).__name__)
        sizes = {name: size for name, size in linear.items() if name in weights.modules}
        lora = cls(sizes, weights.rank, weights.alpha)
        for name, own_a, own_b in zip(sizes, lora.lora_a, lora.lora_b, strict=True):
            a, b = weights.modules[name]
            own_a.data, own_b.data = a.float().clone(), b.float().clone()
        return lora


def linear_layers(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name -> (input features, output features) of every linear layer in the decoder's layers."""
    found = {}
    for name, module in base.named_modules():
        if layer_number(name) < 0:
            continue
        if type(module).__name__.endswith("Router"):
            continue  # Llama 4's is a linear layer that returns more than its product
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layers, weights transposed
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found

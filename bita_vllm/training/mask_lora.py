"""Low-rank deltas for mask rows only: an optional part of an adapter, in PEFT's LoRA format.

`mask_lora/adapter_config.json` and `adapter_model.safetensors` are what PEFT itself would write
for the same modules, so PEFT and vLLM's LoRA loader read them as they are.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bita_vllm.adapter import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, in front of every module's name


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
            rows = args[0]
            low = F.linear(rows, self.lora_a[index].to(rows.dtype))
            scale = self.alpha / self.rank
            return output + F.linear(low, scale * self.lora_b[index].to(rows.dtype))

        return add_delta

    def save(self, path: str | Path, base: PreTrainedModel) -> None:
        """Write PEFT's two files to the directory `path`, each in one move. Raises AdapterError."""
        path = Path(path)
        tensors = {}
        for name, a, b in zip(self.module_names, self.lora_a, self.lora_b, strict=True):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        layers = sorted({layer_number(name) for name in self.module_names})
        everywhere = layers == sorted({layer_number(name) for name in linear_layers(base)})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.config.name_or_path,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.module_names}),
            "layers_to_transform": None if everywhere else layers,
            "fan_in_fan_out": any(
                isinstance(base.get_submodule(name), Conv1D) for name in self.module_names
            ),
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as temp:
                (Path(temp) / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
                (Path(temp) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
                for file in (WEIGHTS_FILE, CONFIG_FILE):
                    os.replace(Path(temp) / file, path / file)
        except OSError as error:
            raise AdapterError(
                f"The low-rank deltas could not be written to {path} ({error})."
            ) from error

    @classmethod
    def load(cls, path: str | Path, base: PreTrainedModel) -> MaskLora:
        """Read deltas for `base` from PEFT's two files. Raises AdapterError."""
        path = Path(path)
        try:
            config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(path / WEIGHTS_FILE)
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterError(
                f"{path} does not hold low-rank deltas in PEFT's format "
                f"({type(error).__name__}: {error})."
            ) from error
        linear = linear_layers(base)
        names = [name for name in linear if f"{PREFIX}{name}.lora_A.weight" in tensors]
        if 2 * len(names) != len(tensors):
            known = {f"{PREFIX}{name}.lora_{part}.weight" for name in names for part in "AB"}
            stranger = sorted(set(tensors) - known)[0]
            raise AdapterError(
                f"{path / WEIGHTS_FILE} holds {stranger}, but {type(base).__name__} has no such "
                "linear layer: the deltas are another model's."
            )
        lora = cls({name: linear[name] for name in names}, rank, alpha)
        for name, a, b in zip(names, lora.lora_a, lora.lora_b, strict=True):
            for parameter, part in ((a, "A"), (b, "B")):
                tensor = tensors.get(f"{PREFIX}{name}.lora_{part}.weight")
                if tensor is None or tensor.shape != parameter.shape:
                    raise AdapterError(
                        f"{path / WEIGHTS_FILE} has lora_{part} of {name} with shape "
                        f"{None if tensor is None else list(tensor.shape)}, but the model and rank "
                        f"{rank} need {list(parameter.shape)}."
                    )
                if not bool(tensor.isfinite().all()):
                    raise AdapterError(
                        f"{path / WEIGHTS_FILE} has values in lora_{part} of {name} that are NaN "
                        "or infinite: its training diverged or the file is damaged."
                    )
                parameter.data = tensor.to(parameter.dtype)
        return lora


def linear_layers(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name -> (input features, output features) of every linear layer in the decoder's layers."""
    found = {}
    for name, module in base.named_modules():
        if layer_number(name) < 0:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layers, weights transposed
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def layer_number(name: str) -> int:
    """Which decoder layer the module called `name` is in, -1 for none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1

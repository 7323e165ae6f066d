"""Low-rank deltas for mask rows as an adapter holds them: PEFT's LoRA files, read, checked, written.

`mask_lora/adapter_config.json` and `adapter_model.safetensors` are what PEFT itself would write for the
same modules, so PEFT and vLLM's LoRA loader read them as they are. Nothing here imports vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bita_vllm.adapter.config import AdapterError, first_line
from bita_vllm.system.atomic_write import written_whole
from bita_vllm.system.file_schemas import LoraSchema, SchemaError, check, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # PEFT's, in front of every module's name
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Options that change what the deltas are (PEFT's LoraConfig), in addition to a `bias` other than "none".
_MUST_BE_OFF = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
# With these, PEFT changes the base model's weights too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def write_config_and_tensors(
    config_file: Path, config: dict[str, Any], weights_file: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """Write both files of a folder, which is made, or neither. Raises OSError, SafetensorError."""
    config_file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(config_file) as new_config, written_whole(weights_file) as new_weights:
        # Not save_file: it makes files that only their owner may read.
        new_weights.write_bytes(save(tensors, metadata={"format": "pt"}))
        new_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class MaskLoraWeights:
    """Deltas `alpha / rank * B(A(input))` of a base model's linear layers.

    Attributes:
        modules: transformers' name of a linear layer -> A `[rank, in]` and B `[out, rank]`.
        fan_in_fan_out: PEFT's note that the base model's weights lie transposed (GPT-2); A and B do not.
        path: where they were read.
    """

    rank: int
    alpha: float
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    fan_in_fan_out: bool = False
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> MaskLoraWeights:
        """Read and check PEFT's two files, onto the CPU, in the dtype they are stored in.

        Raises AdapterError: files missing or damaged, options that would change the deltas, shapes that
        contradict the rank, values that are not finite.
        """
        path = Path(path)
        config = _read_config(path)
        tensors = _read_tensors(path / WEIGHTS_FILE)
        modules = _paired(tensors, path / WEIGHTS_FILE)
        weights = cls(
            config["r"],
            float(config["lora_alpha"]),
            modules,
            bool(config.get("fan_in_fan_out")),
            path,
        )
        for name, pair in modules.items():
            for part, tensor in zip("AB", pair, strict=True):
                weights._check_tensor(name, part, tensor)
        _check_targets(config.get("target_modules"), modules, path)
        return weights

    def to(self, dtype: torch.dtype) -> MaskLoraWeights:
        """The same deltas in another dtype."""
        modules = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in self.modules.items()}
        return replace(self, modules=modules)

    def _check_tensor(self, name: str, part: str, tensor: torch.Tensor) -> None:
        rank_dim = 0 if part == "A" else 1
        if tensor.dim() != 2 or tensor.shape[rank_dim] != self.rank:
            expected = f"[{self.rank}, in]" if part == "A" else f"[out, {self.rank}]"
            raise AdapterError(
                f"{self.label} have lora_{part} of {name} with shape {list(tensor.shape)}, but their "
                f"rank {self.rank} asks for {expected}: tensors and config do not belong together."
            )
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{self.label} have lora_{part} of {name} in {_dtype_name(tensor.dtype)}, but need one of "
                f"{', '.join(map(_dtype_name, _DTYPES))}."
            )
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"{self.label} have values in lora_{part} of {name} that are NaN or infinite: their "
                "training diverged or the file is damaged."
            )

    def check_fit(self, size_of: Callable[[str], tuple[int, int] | None], model: str) -> None:
        """Raise AdapterError unless every module is a linear layer of the base model, of its size.

        Args:
            size_of: name of a module -> (input features, output features) in the base model, None if it
                has no such linear layer.
            model: what messages call the base model.
        """
        for name, (a, b) in self.modules.items():
            size = size_of(name)
            if size is None:
                raise AdapterError(
                    f"{self.label} have a delta for {name}, but {model} has no such linear layer: they are "
                    "another model's."
                )
            if size != (a.shape[1], b.shape[0]):
                raise AdapterError(
                    f"{self.label} have a delta for {name} from {a.shape[1]} to {b.shape[0]} features, but "
                    f"in {model} it goes from {size[0]} to {size[1]}: they are another model's."
                )

    def check_layers(self, num_layers: int) -> None:
        """Raise AdapterError if a module is in a layer that a base model of `num_layers` lacks."""
        if outside := sorted(n for n in self.layers if n >= num_layers):
            raise AdapterError(
                f"{self.label} have deltas in layer {', '.join(map(str, outside))}, but the model has "
                f"layers 0..{num_layers - 1}: they are another model's."
            )

    def save(self, path: str | Path, base_model: str, num_layers: int) -> None:
        """Write PEFT's two files to the directory `path`, each in one move. Raises AdapterError.

        Args:
            base_model: name of the base model.
            num_layers: of the base model; PEFT's config says so if only some of them have deltas.
        """
        path = Path(path)
        tensors = {
            f"{_PREFIX}{name}.lora_{part}.weight": tensor.detach().cpu().contiguous()
            for name, pair in self.modules.items()
            for part, tensor in zip("AB", pair, strict=True)
        }
        everywhere = len(self.layers) == num_layers
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "target_modules": self.targets,
            "layers_to_transform": None if everywhere else self.layers,
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }
        try:
            write_config_and_tensors(path / CONFIG_FILE, config, path / WEIGHTS_FILE, tensors)
        except OSError as error:
            raise AdapterError(
                f"The low-rank deltas could not be written to {path} ({first_line(error)})."
            ) from error

    @property
    def label(self) -> str:
        """How messages call these deltas."""
        return f"The low-rank deltas in {self.path}" if self.path else "The low-rank deltas"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def targets(self) -> list[str]:
        """Last parts of the modules' names, such as q_proj."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    @property
    def layers(self) -> list[int]:
        """Decoder layers that have deltas."""
        return sorted({layer_number(name) for name in self.modules})

    @property
    def outline(self) -> tuple[int, tuple[str, ...]]:
        """Rank and modules: what a compiled model depends on."""
        return self.rank, tuple(sorted(self.modules))

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.modules.values())

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, {','.join(self.targets)} in layers {self.layers}"


def layer_number(name: str) -> int:
    """Which decoder layer the module called `name` is in, -1 for none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _read_config(path: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise AdapterError(
                f"The low-rank deltas in {path} have no {name}; copy or download the adapter again."
            )
    file = path / CONFIG_FILE
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{file} is not readable JSON ({first_line(error)}); copy or download the adapter again."
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{file} has peft_type {short(kind)}, but bita applies LORA only.")
    try:
        check(LoraSchema, config)
    except SchemaError as error:
        raise AdapterError(f"{file} cannot be used: {error}.") from None
    options = {name: config.get(name) for name in _MUST_BE_OFF}
    options["bias"] = None if config.get("bias") == "none" else config.get("bias")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        options["init_lora_weights"] = initial
    if wrong := [f"{name} = {short(value)}" for name, value in options.items() if value]:
        raise AdapterError(
            f"{file} has {', '.join(wrong)}, which bita does not apply to mask rows; train the deltas "
            "without."
        )
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is truncated or not a safetensors file ({first_line(error)}); copy or download the "
            "adapter again."
        ) from error


def _paired(
    tensors: dict[str, torch.Tensor], file: Path
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> its A and B."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise AdapterError(
                f"{file} holds {key}, but bita applies lora_A and lora_B of linear layers only."
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise AdapterError(f"{file} holds no tensors, so there are no deltas to apply.")
    for name, pair in halves.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            raise AdapterError(f"{file} has no lora_{missing} of {name}: its save was cut short.")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _check_targets(targets: Any, modules: Iterable[str], path: Path) -> None:
    """A list of names must be that of the tensors; a pattern (PEFT allows one) says nothing to check."""
    if not isinstance(targets, list):
        return
    met = {t for name in modules for t in targets if name == t or name.endswith(f".{t}")}
    if absent := sorted(set(targets) - met):
        raise AdapterError(
            f"{path / CONFIG_FILE} has {short(', '.join(absent))} in target_modules, but {WEIGHTS_FILE} holds no "
            "such module: they do not belong together."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

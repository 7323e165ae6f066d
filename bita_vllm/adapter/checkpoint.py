"""The adapter checkpoint: load, check, save, random initialisation.

A directory in the `speculators` format: `config.json` (config.py), `model.safetensors` with

    mask_embeddings  [k, H]            input embeddings of the k mask tokens
    prompt_keys      [L, P, Hkv, D]    keys of the P prompt tokens, as attention reads them: no RoPE
    prompt_values    [L, P, Hkv, D]    their values

and maybe `mask_lora/` (deltas.py): low-rank deltas of the linear layers, for mask rows only.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bita_vllm.adapter.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterError,
    ModelShape,
    first_line,
)
from bita_vllm.adapter.deltas import MaskLoraWeights, write_config_and_tensors

__all__ = [
    "CONFIG_FILE",
    "MASK_LORA_DIR",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "ModelShape",
    "random_adapter",
    "resolve_adapter_dir",
    "save_adapter",
]

MASK_LORA_DIR = "mask_lora"
TENSORS = ("mask_embeddings", "prompt_keys", "prompt_values")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A BiTA adapter: the config, its three tensors, and low-rank deltas if it has any."""

    config: AdapterConfig
    mask_embeddings: torch.Tensor  # [k, H]
    prompt_keys: torch.Tensor  # [L, P, Hkv, D]
    prompt_values: torch.Tensor  # [L, P, Hkv, D]
    mask_lora: MaskLoraWeights | None = None

    @classmethod
    def load(cls, path: str | Path, shape: ModelShape | None = None) -> "Adapter":
        """Load an adapter directory onto the CPU, in the dtype it is stored in.

        Checked against its own config, and against the base model's `shape` if that is given.
        Raises AdapterError.
        """
        config = AdapterConfig.load(path)
        if shape is not None:
            config.check(shape)  # before any tensor is read
        tensors = _read_tensors(Path(path) / WEIGHTS_FILE)
        lora_dir = Path(path) / MASK_LORA_DIR
        mask_lora = MaskLoraWeights.load(lora_dir) if lora_dir.exists() else None
        adapter = cls(config, **tensors, mask_lora=mask_lora)
        adapter.check(shape)
        return adapter

    def check(self, shape: ModelShape | None = None) -> None:
        """Check the tensors against the config, and the config against the base model's `shape`.

        Raises AdapterError for a wrong shape, a dtype that is not floating, or a value that is
        not finite.
        """
        if shape is not None:
            self.config.check(shape)
        if self.mask_lora is not None:
            self.mask_lora.check_layers(self.config.model.num_layers)
        for name, expected in _expected_shapes(self.config).items():
            tensor = getattr(self, name)
            sizes = tuple(expected.values())
            if tensor.ndim != len(sizes):
                raise AdapterError(
                    f"{self.config.label} has {name} with {tensor.ndim} dimensions "
                    f"{list(tensor.shape)}, but its config asks for {len(sizes)}, {list(sizes)}: "
                    "the tensors and the config do not belong together."
                )
            wrong = [
                f"{dim} is {size} in the tensor but {expected[dim]} in the config"
                for dim, size in zip(expected, tensor.shape, strict=True)
                if size != expected[dim]
            ]
            if wrong:
                raise AdapterError(
                    f"{self.config.label} has {name} of the wrong shape: {', '.join(wrong)}; "
                    "the tensors and the config do not belong together."
                )
            if tensor.dtype not in _DTYPES:
                raise AdapterError(
                    f"{self.config.label} has {name} in {_dtype_name(tensor.dtype)}, but needs one "
                    f"of {', '.join(map(_dtype_name, _DTYPES))}."
                )
            num_bad = int((~tensor.isfinite()).sum())
            if num_bad:
                raise AdapterError(
                    f"{self.config.label} has {num_bad} values in {name} (of {tensor.numel()}) "
                    "that are NaN or infinite: its training diverged or the file is damaged."
                )

    @property
    def num_bytes(self) -> int:
        """Bytes the tensors take, deltas included."""
        own = sum(getattr(self, name).nbytes for name in TENSORS)
        return own + (self.mask_lora.num_bytes if self.mask_lora else 0)


def resolve_adapter_dir(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local directory of an adapter: the path itself, or a snapshot from the Hugging Face hub.

    Only JSON and safetensors files are downloaded. Raises AdapterError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"The adapter {path} is a file; give the directory that holds it.")
    name = str(name_or_path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise AdapterError(f"The adapter directory {path} does not exist.")

    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    except Exception as error:  # the hub client, its HTTP stack and the cache each raise their own
        at = f" at revision {revision!r}" if revision else ""
        raise AdapterError(
            f"The adapter {name!r} is no local directory and could not be loaded from the Hugging "
            f"Face hub{at} ({type(error).__name__}: {first_line(error)})."
        ) from error
    return Path(snapshot)


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write `adapter` to the directory `path`, which is made if needed.

    A reader or a crash never meets half a file, and no file is replaced before all are written. Raises
    AdapterError if the tensors do not fit the config (nothing is written then) or writing fails.
    """
    adapter.check()
    path = Path(path)
    tensors = {name: getattr(adapter, name).detach().cpu().contiguous() for name in TENSORS}
    if adapter.mask_lora is not None:
        config = adapter.config
        adapter.mask_lora.save(path / MASK_LORA_DIR, config.verifier, config.model.num_layers)
    try:
        write_config_and_tensors(
            path / CONFIG_FILE, adapter.config.raw, path / WEIGHTS_FILE, tensors
        )
        if adapter.mask_lora is None:  # those of the adapter that lay here before
            shutil.rmtree(path / MASK_LORA_DIR, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The adapter could not be written to {path} ({first_line(error)})."
        ) from error


def random_adapter(
    shape: ModelShape,
    num_mask_tokens: int,
    num_prompt_tokens: int,
    seed: int,
    *,
    embedding_std: float = 0.02,
    prompt_std: float = 0.02,
    dtype: torch.dtype = torch.float32,
    verifier: str = "",
    transformer_layer_config: dict[str, Any] | None = None,
    speculative_tokens: int | None = None,
) -> Adapter:
    """An untrained adapter for a base model of `shape`: training's start, and material for tests.

    Values are normal with mean 0; `embedding_std` is best the base model's own embeddings'.
    `transformer_layer_config` is the base model's text config (default: the bare dimensions);
    `speculative_tokens` is the default row budget R-1 (default: a chain of k nodes with a full
    mask group under the root and every node). The same seed gives the same values.
    Raises AdapterError if k or P is out of range or the config is not of `shape`.
    """
    k = num_mask_tokens
    if speculative_tokens is None:
        speculative_tokens = k + k * (k + 1)
    text_config = transformer_layer_config or {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
    }
    raw = {
        "architectures": ["BitaSpeculator"],
        "speculators_model_type": "bita",
        "speculators_config": {
            "algorithm": "bita",
            "proposal_methods": [
                {"proposal_type": "tree", "speculative_tokens": speculative_tokens}
            ],
            "default_proposal_method": "tree",
            "verifier": {
                "name_or_path": verifier,
                "architectures": text_config.get("architectures") or [],
            },
        },
        "transformer_layer_config": text_config,
        "num_mask_tokens": k,
        "num_prompt_tokens": num_prompt_tokens,
    }
    config = AdapterConfig.from_dict(raw)
    config.check(shape)
    generator = torch.Generator().manual_seed(seed)
    std = {"mask_embeddings": embedding_std, "prompt_keys": prompt_std, "prompt_values": prompt_std}
    tensors = {
        name: (std[name] * torch.randn(*sizes.values(), generator=generator)).to(dtype)
        for name, sizes in _expected_shapes(config).items()
    }
    return Adapter(config, **tensors, mask_lora=None)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            # Names first: another model's weights may be large.
            if missing := sorted(set(TENSORS) - names):
                raise AdapterError(
                    f"{path} lacks the tensor {', '.join(missing)}: it is no bita adapter, or its "
                    "save was cut short."
                )
            if unknown := sorted(names - set(TENSORS)):
                raise AdapterError(
                    f"{path} holds the tensor {', '.join(unknown)}, which this bita does not know; "
                    f"an adapter holds {', '.join(TENSORS)} and nothing else."
                )
            return {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is truncated or not a safetensors file ({first_line(error)}); "
            "copy or download the adapter again."
        ) from error


def _expected_shapes(config: AdapterConfig) -> dict[str, dict[str, int]]:
    """Tensor name -> its dimensions by name, in order."""
    prompt = {
        "num_layers": config.model.num_layers,
        "num_prompt_tokens": config.num_prompt_tokens,
        "num_kv_heads": config.model.num_kv_heads,
        "head_size": config.model.head_size,
    }
    mask = {"num_mask_tokens": config.num_mask_tokens, "hidden_size": config.model.hidden_size}
    return dict(zip(TENSORS, (mask, prompt, prompt), strict=True))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

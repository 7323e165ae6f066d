"""The adapter checkpoint: load, check, save, random initialisation.

A directory in the `speculators` format: `config.json` and `model.safetensors`, the latter with

    mask_embeddings  [k, H]            input embeddings of the k mask tokens
    prompt_keys      [L, P, Hkv, D]    keys of the P prompt tokens, as attention reads them: no RoPE
    prompt_values    [L, P, Hkv, D]    their values

Everything that can be wrong with it is an `AdapterError` whose message is one sentence for the
person at the command line. Nothing here imports vLLM.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MASK_LORA_DIR = "mask_lora"
TENSORS = ("mask_embeddings", "prompt_keys", "prompt_values")
MAX_MASK_TOKENS = 16
MAX_PROMPT_TOKENS = 256

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_T = TypeVar("_T")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class AdapterError(ValueError):
    """An adapter that cannot be used; the message is one sentence that says why and what to do."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a base model that an adapter depends on."""

    num_layers: int
    hidden_size: int  # width of an input embedding
    num_kv_heads: int  # of the whole model, not of one tensor-parallel rank
    head_size: int
    vocab_size: int

    @classmethod
    def from_hf_config(cls, config: Any) -> "ModelShape":
        """Read the shape from a Hugging Face text config (a config object or its dict).

        Raises AdapterError if the config lacks one of the dimensions.
        """

        def find(*names: str) -> int | None:
            for name in names:
                value = _get(config, name)
                if _is_int(value) and value > 0:
                    return value
            return None

        num_heads = find("num_attention_heads", "n_head")
        hidden_size = find("hidden_size", "n_embd")
        # Some configs have head_dim = None or 0: then the heads share the hidden size.
        head_size = find("head_dim", "hidden_size_per_head")
        if head_size is None and hidden_size and num_heads:
            head_size = hidden_size // num_heads
        num_kv_heads = find("n_head_kv", "num_kv_heads", "num_key_value_heads") or num_heads
        if _get(config, "multi_query") and not _get(config, "new_decoder_architecture"):
            num_kv_heads = 1  # Falcon-7B says 71 KV heads beside this flag; the flag holds.
        shape = {
            "num_layers": find("num_hidden_layers", "n_layer", "num_layers"),
            # OPT-350m embeds in fewer dimensions than it computes in.
            "hidden_size": find("word_embed_proj_dim") or hidden_size,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "vocab_size": find("vocab_size"),
        }
        missing = [name for name, value in shape.items() if value is None]
        if missing:
            raise AdapterError(
                f"The model config of type {_get(config, 'model_type')!r} does not say its "
                f"{', '.join(missing)}, so bita cannot match an adapter to it."
            )
        return cls(**shape)  # type: ignore[arg-type]  # no None is left


@dataclass(frozen=True)
class AdapterConfig:
    """A validated adapter `config.json`."""

    num_mask_tokens: int  # k
    num_prompt_tokens: int  # P, 0 for none
    model: ModelShape  # of the base model it was trained for
    verifier: str  # name or path of that base model
    speculative_tokens: int  # default R - 1
    acceptance: dict[str, Any] | None  # calibrated statistics, if any
    raw: dict[str, Any] = field(repr=False)  # the file as it was read
    path: Path | None = field(default=None, compare=False)  # where it was read

    @classmethod
    def load(cls, path: str | Path) -> "AdapterConfig":
        """Read and validate `path/config.json`; no tensor is touched.

        Raises AdapterError if the directory's layout or the config is not a bita adapter's.
        """
        path = Path(path)
        _check_layout(path)
        try:
            raw = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{path / CONFIG_FILE} is not readable JSON ({_first_line(error)}); "
                "copy or download the adapter again."
            ) from error
        return cls.from_dict(raw, path)

    @classmethod
    def from_dict(cls, raw: Any, path: Path | None = None) -> "AdapterConfig":
        """Validate the contents of a config.json. Raises AdapterError."""
        where = str(path / CONFIG_FILE) if path else "the adapter's config"
        if not isinstance(raw, dict):
            raise AdapterError(f"{where} must hold a JSON object, but holds {_kind(raw)}.")
        kind = raw.get("speculators_model_type")
        if kind != "bita":
            raise AdapterError(
                f"{where} has speculators_model_type {kind!r}, but bita needs 'bita': "
                "this is not a bita adapter."
            )
        speculators = _entry(raw, "speculators_config", dict, where)
        methods = _entry(speculators, "proposal_methods", list, where)
        if not methods or not isinstance(methods[0], dict):
            raise AdapterError(f"{where} needs one object in proposal_methods.")
        verifier = _entry(speculators, "verifier", dict, where)
        acceptance = raw.get("acceptance")
        if acceptance is not None:
            acceptance = _entry(raw, "acceptance", dict, where)
        try:
            model = ModelShape.from_hf_config(_entry(raw, "transformer_layer_config", dict, where))
        except AdapterError as error:
            raise AdapterError(f"In {where}, transformer_layer_config is wrong: {error}") from error
        return cls(
            num_mask_tokens=_int_entry(raw, "num_mask_tokens", 1, MAX_MASK_TOKENS, where),
            num_prompt_tokens=_int_entry(raw, "num_prompt_tokens", 0, MAX_PROMPT_TOKENS, where),
            model=model,
            verifier=_entry(verifier, "name_or_path", str, where),
            speculative_tokens=_int_entry(methods[0], "speculative_tokens", 1, None, where),
            acceptance=acceptance,
            raw=raw,
            path=path,
        )

    @property
    def label(self) -> str:
        """How messages call this adapter."""
        return f"The adapter {self.path}" if self.path else f"The adapter for {self.verifier!r}"

    def check(self, shape: ModelShape) -> None:
        """Raise AdapterError, naming every dimension in which the base model differs."""
        model = asdict(shape)
        wrong = [
            f"{name} is {size} in the adapter but {model[name]} in the model"
            for name, size in asdict(self.model).items()
            if size != model[name]
        ]
        if wrong:
            raise AdapterError(
                f"{self.label} was trained for another model: {', '.join(wrong)}; serve it with "
                f"its own base model {self.verifier!r}, or use an adapter trained for this model."
            )


@dataclass(frozen=True, eq=False)
class Adapter:
    """A BiTA adapter: the config and its three tensors."""

    config: AdapterConfig
    mask_embeddings: torch.Tensor  # [k, H]
    prompt_keys: torch.Tensor  # [L, P, Hkv, D]
    prompt_values: torch.Tensor  # [L, P, Hkv, D]

    @classmethod
    def load(cls, path: str | Path, shape: ModelShape | None = None) -> "Adapter":
        """Load an adapter directory onto the CPU, in the dtype it is stored in.

        Checked against its own config, and against the base model's `shape` if that is given.
        Raises AdapterError.
        """
        config = AdapterConfig.load(path)
        if shape is not None:
            config.check(shape)  # before any tensor is read
        adapter = cls(config, **_read_tensors(Path(path) / WEIGHTS_FILE))
        adapter.check(shape)
        return adapter

    def check(self, shape: ModelShape | None = None) -> None:
        """Check the tensors against the config, and the config against the base model's `shape`.

        Raises AdapterError for a wrong shape, a dtype that is not floating, or a value that is
        not finite.
        """
        if shape is not None:
            self.config.check(shape)
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
        """Bytes the three tensors take."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def shard(self, tp_rank: int, tp_size: int) -> "Adapter":
        """The adapter as one tensor-parallel rank holds it; the config stays the whole model's.

        KV heads are dealt as vLLM deals the model's own: consecutive heads to consecutive ranks,
        and when there are fewer heads than ranks, each head to tp_size / Hkv neighbours.
        Raises AdapterError if that does not come out even.
        """
        heads = self.config.model.num_kv_heads
        if not 0 <= tp_rank < tp_size:
            raise AdapterError(f"Tensor-parallel rank {tp_rank} is outside 0..{tp_size - 1}.")
        if max(heads, tp_size) % min(heads, tp_size):
            raise AdapterError(
                f"{self.config.label} has num_kv_heads {heads}, which does not divide evenly over "
                f"tensor_parallel_size {tp_size}; choose a size that divides {heads} or is a "
                "multiple of it."
            )
        first = tp_rank * heads // tp_size
        last = first + max(1, heads // tp_size)
        return replace(
            self,
            prompt_keys=self.prompt_keys[:, :, first:last].contiguous(),
            prompt_values=self.prompt_values[:, :, first:last].contiguous(),
        )


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
            f"The adapter {name!r} is no local directory and could not be had from the Hugging "
            f"Face hub{at} ({type(error).__name__}: {_first_line(error)})."
        ) from error
    return Path(snapshot)


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write `adapter` to the directory `path`, which is made if needed.

    Each file is replaced in one move, so a reader or a crash never meets half a file. Raises
    AdapterError if the tensors do not fit the config (nothing is written then) or writing fails.
    """
    adapter.check()
    path = Path(path)
    tensors = {name: getattr(adapter, name).detach().cpu().contiguous() for name in TENSORS}
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as temp:
            # Not save_file: it makes files that only their owner may read.
            (Path(temp) / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
            (Path(temp) / CONFIG_FILE).write_text(
                json.dumps(adapter.config.raw, indent=2) + "\n", encoding="utf-8"
            )
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(temp) / name, path / name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The adapter could not be written to {path} ({_first_line(error)})."
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
    return Adapter(config, **tensors)


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
            f"{path} is truncated or not a safetensors file ({_first_line(error)}); "
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


def _check_layout(path: Path) -> None:
    """Raise AdapterError unless `path` is a directory that holds what this version can serve."""
    if not path.is_dir():
        raise AdapterError(f"The adapter directory {path} does not exist.")
    if not (path / WEIGHTS_FILE).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise AdapterError(
                f"The adapter {path} holds pickle files only ({', '.join(pickles)}), which can run "
                f"code when they are read; convert them to {WEIGHTS_FILE}."
            )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise AdapterError(f"The adapter {path} has no {name}.")
    if (path / MASK_LORA_DIR).exists():
        raise AdapterError(
            f"The adapter {path} has low-rank deltas ({MASK_LORA_DIR}/), which this bita does not "
            "serve yet; without them its drafts would be worse than it was trained for, so use a "
            "newer bita or an adapter without them."
        )


def _entry(raw: dict[str, Any], key: str, kind: type[_T], where: str) -> _T:
    value = raw.get(key)
    if not isinstance(value, kind):
        raise AdapterError(
            f"{where} needs {key} to be {_JSON_NAMES[kind]}, but it is {_kind(value)}."
        )
    return value


def _int_entry(raw: dict[str, Any], key: str, low: int, high: int | None, where: str) -> int:
    value = raw.get(key)
    if not _is_int(value) or value < low or (high is not None and value > high):
        span = f"{low}..{high}" if high is not None else f"at least {low}"
        raise AdapterError(
            f"{where} needs {key} to be a whole number, {span}, but it is "
            f"{'missing' if value is None else repr(value)}."
        )
    return value


_JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def _kind(value: Any) -> str:
    return "missing" if value is None else _JSON_NAMES.get(type(value), repr(value))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")

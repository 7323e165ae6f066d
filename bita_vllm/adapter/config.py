"""The adapter's `config.json`, and the dimensions of a base model that an adapter depends on.

Everything that can be wrong with an adapter is an `AdapterError` whose message is one sentence for the
person at the command line. Nothing here imports vLLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeGuard, TypeVar

from bita_vllm.system.errors import UserError
from bita_vllm.system.file_schemas import (
    MAX_MASK_TOKENS,
    AcceptanceSchema,
    SchemaError,
    beyond_masks,
    check,
    read_json,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_PROMPT_TOKENS = 256

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_T = TypeVar("_T")


class AdapterError(UserError):
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
            num_kv_heads = 1  # Falcon-7B says 71 KV heads and sets this flag; the flag holds.
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
                f"The model config of type {short(_get(config, 'model_type'))} does not say its "
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
            raw = read_json(path / CONFIG_FILE)
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{path / CONFIG_FILE} is not readable JSON ({first_line(error)}); "
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
                f"{where} has speculators_model_type {short(kind)}, but bita needs 'bita': "
                "this is not a bita adapter."
            )
        speculators = _entry(raw, "speculators_config", dict, where)
        methods = _entry(speculators, "proposal_methods", list, where)
        if not methods or not isinstance(methods[0], dict):
            raise AdapterError(f"{where} needs one object in proposal_methods.")
        verifier = _entry(speculators, "verifier", dict, where)
        num_masks = _int_entry(raw, "num_mask_tokens", 1, MAX_MASK_TOKENS, where)
        acceptance = raw.get("acceptance")
        if acceptance is not None:
            acceptance = _entry(raw, "acceptance", dict, where)
            _check_acceptance(acceptance, num_masks, where)
        try:
            model = ModelShape.from_hf_config(_entry(raw, "transformer_layer_config", dict, where))
        except AdapterError as error:
            raise AdapterError(f"In {where}, transformer_layer_config is wrong: {error}") from error
        return cls(
            num_mask_tokens=num_masks,
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


def _check_layout(path: Path) -> None:
    """Raise AdapterError unless `path` is a directory that holds an adapter."""
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


def _check_acceptance(acceptance: dict[str, Any], num_masks: int, where: str) -> None:
    """Raise AdapterError unless statistics and template sets are such as `bita eval` makes for this adapter."""
    again = "run 'bita eval' to make them again"
    try:
        sets = check(AcceptanceSchema, acceptance).template_sets
    except SchemaError as error:
        raise AdapterError(
            f"The acceptance statistics in {where} cannot be used: {error}; {again}."
        ) from None
    for rows, one in sets.items():
        longest = max((template.longest_group for template in one.templates), default=0)
        deepest = max((template.mask_depth for template in one.templates), default=0)
        if beyond := beyond_masks(longest, deepest, num_masks):
            raise AdapterError(f"The template set of {rows} rows in {where} has {beyond}; {again}.")


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
            f"{'missing' if value is None else short(value)}."
        )
    return value


_JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def _kind(value: Any) -> str:
    return "missing" if value is None else _JSON_NAMES.get(type(value), short(value))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _get(config: Any, name: str) -> Any:
    """Return a field of a model's config, None if it has none. Raises AdapterError where layers differ in it."""
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        raise AdapterError(
            f"The layers of a model of type {short(config.model_type)} differ in {name}, but an adapter's prompt "
            "tokens have one shape in all layers; bita does not support this model."
        ) from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")

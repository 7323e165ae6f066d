"""The adapter checkpoint: round trips, and one helpful sentence for each thing that can go bad."""

import copy
import json
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file

from bita_vllm.adapter.checkpoint import Adapter, random_adapter, resolve_adapter_dir, save_adapter
from bita_vllm.adapter.config import AdapterConfig, AdapterError, ModelShape

SHAPE = ModelShape(num_layers=2, hidden_size=32, num_kv_heads=2, head_size=8, vocab_size=100)
SHIPPED = Path(__file__).parents[2] / "adapters"


def make_adapter(num_mask: int = 3, num_prompt: int = 4, **options: Any) -> Adapter:
    return random_adapter(SHAPE, num_mask, num_prompt, seed=0, verifier="org/base", **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    save_adapter(path, make_adapter())
    return path


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        "mask_embeddings": adapter.mask_embeddings,
        "prompt_keys": adapter.prompt_keys,
        "prompt_values": adapter.prompt_values,
    }


def rewrite_config(path: Path, **entries: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def rewrite_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**tensors_of(make_adapter()), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")


def assert_refused(action: Any, *facts: object) -> None:
    """The action raises AdapterError with one line that holds each of the facts."""
    with pytest.raises(AdapterError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fact in facts:
        assert str(fact) in message


# Loading, saving, making

ON_A_GPU = [*(f"human{n}.jsonl" for n in (4, 5, 6)), *(f"own{n}.jsonl" for n in (11, 12, 8))]


@pytest.mark.parametrize("num_prompt", [0, 1, 4], ids=lambda p: f"P{p}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, num_prompt: int) -> None:
    adapter = make_adapter(num_prompt=num_prompt, dtype=dtype)
    save_adapter(tmp_path / "a", adapter)
    loaded = Adapter.load(tmp_path / "a", SHAPE)
    assert loaded.config == adapter.config
    for name, tensor in tensors_of(adapter).items():
        torch.testing.assert_close(tensors_of(loaded)[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "rank", "later"),
    [
        (
            "smollm2-135m-instruct",
            16,
            [
                *[["human.jsonl"]] * 2,
                ["mixed.jsonl", "own4.jsonl"],
                ["unseen_mixed.jsonl", "unseen_own4.jsonl"],
                ["own6.jsonl", "mixed.jsonl", "own4.jsonl"],
                ["mixed.jsonl", "human.jsonl", "own4.jsonl"],
                ["human.jsonl", "mixed.jsonl", "own4.jsonl", "own6.jsonl"],
                ["own7.jsonl", "own6.jsonl"],
                ["own8.jsonl", "human4.jsonl"],
                ON_A_GPU,
            ],
        ),
        (
            "smollm2-135m-instruct-no-deltas",
            None,
            [["human.jsonl", "own.jsonl"], ["own8.jsonl", "human4.jsonl"], ON_A_GPU],
        ),
    ],
)
def test_shipped_adapters_load_and_say_where_they_come_from(
    name: str, rank: int | None, later: list[list[str]]
) -> None:
    adapter = Adapter.load(SHIPPED / name, ModelShape(30, 576, 3, 64, 49152))
    assert adapter.config.num_mask_tokens == 3
    assert adapter.config.num_prompt_tokens == 16
    assert adapter.config.speculative_tokens == 15
    assert adapter.config.verifier == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (adapter.mask_lora and adapter.mask_lora.rank) == rank
    assert adapter.config.acceptance is not None
    training = adapter.config.raw["training"]
    assert training["steps_done"] == training["arguments"]["steps"]
    runs = [training]
    while "started_from" in runs[0]:
        runs.insert(0, runs[0]["started_from"])
    files = [[data["file"] for data in run["data"]] for run in runs]
    assert files == [["own.jsonl", "own2.jsonl", "human.jsonl"], *later]
    text = (SHIPPED / name / "config.json").read_text()
    assert not any(folder in text for folder in ("/root", "/home", "/tmp"))


def test_saved_config_is_the_speculators_format(tmp_path: Path) -> None:
    text_config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        architectures=["LlamaForCausalLM"],
    ).to_dict()
    adapter = make_adapter(transformer_layer_config=text_config, speculative_tokens=51)
    save_adapter(tmp_path, adapter)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["BitaSpeculator"],
        "speculators_model_type": "bita",
        "speculators_config": {
            "algorithm": "bita",
            "proposal_methods": [{"proposal_type": "tree", "speculative_tokens": 51}],
            "default_proposal_method": "tree",
            "verifier": {"name_or_path": "org/base", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": json.loads(json.dumps(text_config)),  # its keys become strings
        "num_mask_tokens": 3,
        "num_prompt_tokens": 4,
    }


def test_config_loads_without_reading_tensors(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not read")
    assert AdapterConfig.load(saved).model == SHAPE


def test_unknown_config_entries_and_acceptance_survive_a_round_trip(
    saved: Path, tmp_path: Path
) -> None:
    rewrite_config(saved, acceptance={"p": [0.5]}, note="kept")
    save_adapter(tmp_path / "again", Adapter.load(saved))
    config = AdapterConfig.load(tmp_path / "again")
    assert config.acceptance == {"p": [0.5]}
    assert config.raw["note"] == "kept"


def test_saving_over_an_adapter_leaves_only_whole_files(saved: Path) -> None:
    save_adapter(saved, make_adapter(num_prompt=7))
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert Adapter.load(saved).config.num_prompt_tokens == 7


def test_failed_save_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("bita_vllm.adapter.deltas.save", fail)
    assert_refused(lambda: save_adapter(saved, make_adapter(num_prompt=7)), saved, "disk full")
    assert Adapter.load(saved).config.num_prompt_tokens == 4
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_both_saved_files_have_the_same_permissions(saved: Path) -> None:
    modes = {stat.S_IMODE((saved / n).stat().st_mode) for n in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_save_refuses_what_load_would(tmp_path: Path) -> None:
    adapter = make_adapter()
    adapter.mask_embeddings[0, 0] = torch.nan
    assert_refused(lambda: save_adapter(tmp_path / "a", adapter), "mask_embeddings", "NaN")
    assert not (tmp_path / "a").exists()


def test_random_adapter_is_seeded_and_scaled() -> None:
    a, b, c = (
        random_adapter(ModelShape(4, 512, 4, 64, 100), 3, 16, seed, embedding_std=2.0)
        for seed in (0, 0, 1)
    )
    assert torch.equal(a.mask_embeddings, b.mask_embeddings)
    assert not torch.equal(a.mask_embeddings, c.mask_embeddings)
    assert a.mask_embeddings.std().item() == pytest.approx(2.0, rel=0.1)
    assert a.prompt_keys.std().item() == pytest.approx(0.02, rel=0.1)


def test_random_adapter_refuses_a_config_of_another_shape() -> None:
    text_config = copy.deepcopy(make_adapter().config.raw["transformer_layer_config"])
    text_config["hidden_size"] = 48
    assert_refused(
        lambda: make_adapter(transformer_layer_config=text_config), "hidden_size", 48, 32
    )


# Against the base model


@pytest.mark.parametrize(
    "dimension", ["num_layers", "hidden_size", "num_kv_heads", "head_size", "vocab_size"]
)
def test_other_model_is_named_by_dimension_and_both_numbers(saved: Path, dimension: str) -> None:
    sizes = {**vars(SHAPE)}
    sizes[dimension] = 777
    wanted = f"{dimension} is {vars(SHAPE)[dimension]} in the adapter but 777 in the model"
    shape = ModelShape(**sizes)
    for check in (
        lambda: Adapter.load(saved, shape),
        lambda: Adapter.load(saved).check(shape),
        lambda: AdapterConfig.load(saved).check(shape),
    ):
        assert_refused(check, saved, wanted, "'org/base'")


def test_other_model_is_refused_before_tensors_are_read(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not read")
    assert_refused(lambda: Adapter.load(saved, ModelShape(9, 32, 2, 8, 100)), "num_layers", 2, 9)


# Tensors


@pytest.mark.parametrize(
    ("name", "sizes", "facts"),
    [
        ("mask_embeddings", (2, 32), "num_mask_tokens is 2 in the tensor but 3 in the config"),
        ("mask_embeddings", (3, 48), "hidden_size is 48 in the tensor but 32 in the config"),
        ("prompt_keys", (5, 4, 2, 8), "num_layers is 5 in the tensor but 2 in the config"),
        ("prompt_keys", (2, 6, 2, 8), "num_prompt_tokens is 6 in the tensor but 4 in the config"),
        ("prompt_values", (2, 4, 1, 8), "num_kv_heads is 1 in the tensor but 2 in the config"),
        ("prompt_values", (2, 4, 2, 16), "head_size is 16 in the tensor but 8 in the config"),
        ("prompt_values", (2, 4, 16), "3 dimensions [2, 4, 16], but its config asks for 4"),
    ],
)
def test_wrong_tensor_shape(saved: Path, name: str, sizes: tuple[int, ...], facts: str) -> None:
    rewrite_tensors(saved, **{name: torch.zeros(sizes)})
    assert_refused(lambda: Adapter.load(saved), saved, name, facts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["mask_embeddings", "prompt_keys", "prompt_values"])
def test_values_must_be_finite(saved: Path, name: str, value: float) -> None:
    tensor = tensors_of(make_adapter())[name].clone()
    tensor.view(-1)[-2:] = value
    rewrite_tensors(saved, **{name: tensor})
    assert_refused(lambda: Adapter.load(saved), saved, name, f"2 values in {name}", tensor.numel())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_dtype_must_be_plain_floating(saved: Path, dtype: torch.dtype) -> None:
    rewrite_tensors(saved, mask_embeddings=torch.zeros(3, 32).to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert_refused(lambda: Adapter.load(saved), saved, "mask_embeddings", name, "bfloat16")


def test_missing_tensor_is_named(saved: Path) -> None:
    rewrite_tensors(saved, prompt_values=None)
    assert_refused(lambda: Adapter.load(saved), saved, "lacks the tensor prompt_values")


def test_unknown_tensor_is_named(saved: Path) -> None:
    rewrite_tensors(saved, surprise=torch.zeros(1))
    assert_refused(lambda: Adapter.load(saved), saved, "surprise", "mask_embeddings")


@pytest.mark.parametrize("keep", [0, 4, 40, -1], ids=["empty", "length", "header", "data"])
def test_truncated_safetensors(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(lambda: Adapter.load(saved), file, "truncated")


def test_corrupted_safetensors(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(b"\xff" * 400)
    assert_refused(lambda: Adapter.load(saved), file, "not a safetensors file")


# Directory and config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert_refused(lambda: AdapterConfig.load(saved), saved, f"has no {name}")


def test_missing_directory(tmp_path: Path) -> None:
    assert_refused(lambda: Adapter.load(tmp_path / "none"), tmp_path / "none", "does not exist")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter.pt", "prefix.pth"])
def test_pickle_only_is_refused(saved: Path, name: str) -> None:
    (saved / "model.safetensors").rename(saved / name)
    assert_refused(lambda: AdapterConfig.load(saved), saved, name, "pickle", "model.safetensors")


def test_pickle_beside_safetensors_is_ignored(saved: Path) -> None:
    (saved / "optimizer.pt").write_bytes(b"")
    Adapter.load(saved)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\xfd"], ids=["cut", "empty", "not-utf8"])
def test_config_that_is_not_json(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    assert_refused(lambda: AdapterConfig.load(saved), saved / "config.json", "not readable JSON")


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_config_that_is_no_object(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    assert_refused(lambda: AdapterConfig.load(saved), saved / "config.json", "JSON object")


@pytest.mark.parametrize("kind", ["eagle3", None], ids=str)
def test_other_speculators_model_type(saved: Path, kind: str | None) -> None:
    rewrite_config(saved, speculators_model_type=kind)
    assert_refused(lambda: AdapterConfig.load(saved), saved, repr(kind), "'bita'")


@pytest.mark.parametrize(
    ("key", "value", "span"),
    [
        ("num_mask_tokens", 0, "1..16"),
        ("num_mask_tokens", 17, "1..16"),
        ("num_mask_tokens", "3", "1..16"),
        ("num_mask_tokens", True, "1..16"),
        ("num_mask_tokens", 3.0, "1..16"),
        ("num_prompt_tokens", -1, "0..256"),
        ("num_prompt_tokens", 257, "0..256"),
        ("num_prompt_tokens", None, "0..256"),
    ],
)
def test_numbers_out_of_range(saved: Path, key: str, value: Any, span: str) -> None:
    rewrite_config(saved, **{key: value})
    shown = "missing" if value is None else repr(value)
    assert_refused(lambda: AdapterConfig.load(saved), saved, key, span, shown)


@pytest.mark.parametrize("key", ["speculators_config", "transformer_layer_config"])
@pytest.mark.parametrize("value", [None, [], "text"], ids=str)
def test_config_section_missing_or_of_wrong_kind(saved: Path, key: str, value: Any) -> None:
    rewrite_config(saved, **{key: value})
    assert_refused(lambda: AdapterConfig.load(saved), saved, key, "an object")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"proposal_methods": []}, ["proposal_methods"]),
        ({"proposal_methods": {}}, ["proposal_methods", "a list"]),
        ({"proposal_methods": [{}]}, ["speculative_tokens", "missing"]),
        ({"proposal_methods": [{"speculative_tokens": 0}]}, ["speculative_tokens", "at least 1"]),
        ({"verifier": None}, ["verifier", "missing"]),
        ({"verifier": {"name_or_path": 5}}, ["name_or_path", "a string", "5"]),
    ],
)
def test_bad_speculators_config(saved: Path, change: dict[str, Any], facts: list[str]) -> None:
    speculators = json.loads((saved / "config.json").read_text())["speculators_config"]
    rewrite_config(saved, speculators_config={**speculators, **change})
    assert_refused(lambda: AdapterConfig.load(saved), saved, *facts)


def test_model_config_without_a_dimension(saved: Path) -> None:
    rewrite_config(saved, transformer_layer_config={"model_type": "odd", "hidden_size": 32})
    assert_refused(
        lambda: AdapterConfig.load(saved), saved, "'odd'", "num_layers, num_kv_heads, head_size"
    )


def test_acceptance_must_be_an_object(saved: Path) -> None:
    rewrite_config(saved, acceptance=[0.5])
    assert_refused(lambda: AdapterConfig.load(saved), saved, "acceptance", "a list")


# Model shapes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.LlamaConfig(
                num_hidden_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=100,
            ),
            SHAPE,
        ),
        (
            transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100),
            ModelShape(2, 32, 4, 8, 100),
        ),
        (
            transformers.OPTConfig(
                num_hidden_layers=2,
                hidden_size=32,
                word_embed_proj_dim=16,
                num_attention_heads=4,
                vocab_size=100,
            ),
            ModelShape(2, 16, 4, 8, 100),
        ),
        (
            transformers.Gemma2Config(
                num_hidden_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=24,
                vocab_size=100,
            ),
            ModelShape(2, 32, 2, 24, 100),
        ),
        (
            transformers.FalconConfig(
                num_hidden_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                multi_query=True,
                vocab_size=100,
            ),
            ModelShape(2, 32, 1, 8, 100),
        ),
        (
            transformers.FalconConfig(
                num_hidden_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                new_decoder_architecture=True,
                num_kv_heads=2,
                vocab_size=100,
            ),
            SHAPE,
        ),
    ],
    ids=["llama", "gpt2", "opt-projected", "gemma2-head-dim", "falcon-mqa", "falcon-gqa"],
)
def test_shape_of_hf_configs(config: Any, expected: ModelShape) -> None:
    assert ModelShape.from_hf_config(config) == expected
    assert ModelShape.from_hf_config(config.to_dict()) == expected


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}, {"head_dim": 0}], ids=str)
def test_shape_without_head_dim_or_kv_heads(head_dim: dict[str, Any]) -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 100,
        **head_dim,
    }
    assert ModelShape.from_hf_config(config) == ModelShape(2, 32, 4, 8, 100)


# Where adapters come from


def test_local_directory_resolves_to_itself(saved: Path) -> None:
    assert resolve_adapter_dir(saved) == saved
    assert resolve_adapter_dir(str(saved)) == saved


@pytest.mark.parametrize("name", ["/no/such/dir", "./none", "a/b/c"])
def test_path_that_does_not_exist_is_not_sought_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("hub"))
    assert_refused(lambda: resolve_adapter_dir(name), Path(name), "does not exist")


def test_file_instead_of_directory(saved: Path) -> None:
    file = saved / "model.safetensors"
    assert_refused(lambda: resolve_adapter_dir(file), file, "directory")


def test_hub_name_is_downloaded_without_pickles(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_adapter_dir("org/adapter", revision="v1") == saved
    options = {"revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}
    assert calls == [("org/adapter", options)]


@pytest.mark.parametrize("error", [OSError("offline\nmore"), ValueError("bad name"), KeyError()])
def test_hub_failure_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_refused(
        lambda: resolve_adapter_dir("org/adapter", revision="v1"),
        "'org/adapter'",
        "'v1'",
        type(error).__name__,
    )

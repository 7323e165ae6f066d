"""Low-rank deltas as files: PEFT's format, and one helpful sentence for each thing that can go bad."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bita_vllm.adapter.checkpoint import Adapter, random_adapter, save_adapter
from bita_vllm.adapter.config import AdapterError, ModelShape
from bita_vllm.adapter.deltas import CONFIG_FILE, WEIGHTS_FILE, MaskLoraWeights

RANK, IN, OUT = 4, 32, 48
SIZES = {"q_proj": (IN, OUT), "down_proj": (OUT, IN)}
SHAPE = ModelShape(num_layers=3, hidden_size=IN, num_kv_heads=2, head_size=8, vocab_size=100)


def make(layers=(0, 2), dtype=torch.float32) -> MaskLoraWeights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    modules = {
        f"model.layers.{layer}.{name}": (random(RANK, inputs), random(outputs, RANK))
        for layer in layers
        for name, (inputs, outputs) in SIZES.items()
    }
    return MaskLoraWeights(RANK, 8.0, modules)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save(tmp_path, "org/base", num_layers=3)
    return tmp_path


def rewrite_config(path: Path, **entries: Any) -> None:
    file = path / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def rewrite_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, path / WEIGHTS_FILE)


def key(part: str, name: str = "q_proj", layer: int = 0) -> str:
    return f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"


def assert_refused(action: Callable[[], Any], *facts: str) -> None:
    with pytest.raises(AdapterError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fact in facts:
        assert fact in message


def test_saved_in_pefts_format(saved):
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["layers_to_transform"] == [0, 2]
    tensors = load_file(saved / WEIGHTS_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        key(part, name, layer): (RANK, inputs) if part == "A" else (outputs, RANK)
        for layer in (0, 2)
        for name, (inputs, outputs) in SIZES.items()
        for part in "AB"
    }


def test_deltas_in_every_layer_need_no_list_of_layers(tmp_path):
    make(layers=(0, 1, 2)).save(tmp_path, "org/base", num_layers=3)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["layers_to_transform"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loading_gives_back_what_was_saved(tmp_path, dtype):
    weights = make(dtype=dtype)
    weights.save(tmp_path, "org/base", 3)
    loaded = MaskLoraWeights.load(tmp_path)
    assert (loaded.rank, loaded.alpha, loaded.scale) == (RANK, 8.0, 2.0)
    assert loaded.modules.keys() == weights.modules.keys()
    for name, pair in weights.modules.items():
        assert all(map(torch.equal, loaded.modules[name], pair))
        assert loaded.modules[name][0].dtype == dtype
    assert loaded.num_bytes == 4 * RANK * (IN + OUT) * dtype.itemsize


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert_refused(lambda: MaskLoraWeights.load(saved), str(saved), f"no {name}")


def test_damaged_files(saved):
    good = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(good[:-7])
    assert_refused(lambda: MaskLoraWeights.load(saved), WEIGHTS_FILE, "truncated")
    (saved / CONFIG_FILE).write_text("{")
    assert_refused(lambda: MaskLoraWeights.load(saved), CONFIG_FILE, "not readable JSON")


@pytest.mark.parametrize(
    ("entries", "facts"),
    [
        ({"peft_type": "LOHA"}, ["peft_type 'LOHA'", "LORA only"]),
        ({"r": 0}, ["r to be a whole number, at least 1, but it is 0"]),
        ({"r": "4"}, ["but it is '4'"]),
        ({"r": None}, ["but it is None"]),
        ({"lora_alpha": None}, ["lora_alpha to be a number, but it is None"]),
        ({"lora_alpha": math.nan}, ["lora_alpha to be a number, but it is nan"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'", "does not apply"]),
        ({"use_dora": True}, ["use_dora = True"]),
        ({"use_rslora": True}, ["use_rslora = True"]),
        ({"lora_bias": True, "use_dora": True}, ["use_dora = True, lora_bias = True"]),
        ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern = {'q_proj': 8}"]),
        ({"alpha_pattern": {"q_proj": 8}}, ["alpha_pattern"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save = ['lm_head']"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights = 'pissa_niter_4'"]),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            ["'v_proj' in target_modules", "no such module"],
        ),
        ({"r": 8}, ["lora_A", "shape [4, ", "rank 8 asks for [8, in]"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_not_applied_are_refused(saved, entries, facts):
    rewrite_config(saved, **entries)
    assert_refused(lambda: MaskLoraWeights.load(saved), str(saved), *facts)


def test_options_without_effect_are_taken(saved):
    rewrite_config(saved, init_lora_weights=True, lora_dropout=0.1, target_modules="all-linear")
    rewrite_config(saved, rank_pattern={}, modules_to_save=None, revision="main")
    assert MaskLoraWeights.load(saved).rank == RANK


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t.pop(key("B")), ["no lora_B of model.layers.0.q_proj", "cut short"]),
        (lambda t: t.update({key("B"): torch.zeros(OUT, 3)}), ["lora_B", "[48, 3]", "[out, 4]"]),
        (lambda t: t.update({key("A"): torch.zeros(4)}), ["lora_A", "shape [4]"]),
        (lambda t: t[key("A")].fill_(math.inf), ["lora_A of model.layers.0.q_proj", "infinite"]),
        (lambda t: t[key("B")][1:2].fill_(math.nan), ["lora_B of model.layers.0.q_proj", "NaN"]),
        (lambda t: t.update({key("A"): torch.zeros(4, IN, dtype=torch.int8)}), ["in int8"]),
        (lambda t: t.update(other=torch.zeros(1)), ["holds other", "linear layers only"]),
        (lambda t: t.clear(), ["holds no tensors"]),
    ],
    ids=["no B", "rank of B", "dimensions", "infinite", "NaN", "integers", "stranger", "empty"],
)
def test_tensors_that_cannot_be_are_refused(saved, change, facts):
    rewrite_tensors(saved, change)
    assert_refused(lambda: MaskLoraWeights.load(saved), str(saved), *facts)


def test_deltas_of_another_model_are_refused():
    weights = make()

    def sizes(**changes):
        return lambda name: {**SIZES, **changes}[name.rpartition(".")[2]]

    weights.check_fit(sizes(), "Llama")
    assert_refused(
        lambda: weights.check_fit(sizes(down_proj=None), "Llama"),
        "model.layers.0.down_proj, but Llama has no such linear layer",
    )
    assert_refused(
        lambda: weights.check_fit(sizes(q_proj=(IN, 64)), "Llama"),
        "model.layers.0.q_proj from 32 to 48 features, but in Llama it goes from 32 to 64",
    )


# In an adapter


def test_an_adapter_carries_them(tmp_path):
    adapter = random_adapter(SHAPE, 3, 4, seed=0, verifier="org/base")
    with_deltas = Adapter(
        adapter.config,
        adapter.mask_embeddings,
        adapter.prompt_keys,
        adapter.prompt_values,
        make(),
    )
    save_adapter(tmp_path, with_deltas)
    loaded = Adapter.load(tmp_path, SHAPE)
    assert loaded.mask_lora is not None
    assert loaded.mask_lora.modules.keys() == make().modules.keys()
    assert loaded.num_bytes == adapter.num_bytes + make().num_bytes
    save_adapter(tmp_path, adapter)
    assert Adapter.load(tmp_path).mask_lora is None, "deltas of the adapter that lay here before"


def test_layers_that_the_model_lacks_are_refused_with_the_adapter(tmp_path):
    save_adapter(tmp_path, random_adapter(SHAPE, 3, 4, seed=0))
    make(layers=(1, 3)).save(tmp_path / "mask_lora", "org/base", 4)
    assert_refused(lambda: Adapter.load(tmp_path), "layer 3", "layers 0..2", "mask_lora")


def test_an_empty_directory_is_no_adapter_without_deltas(tmp_path):
    save_adapter(tmp_path, random_adapter(SHAPE, 3, 4, seed=0))
    (tmp_path / "mask_lora").mkdir()
    assert_refused(lambda: Adapter.load(tmp_path), "mask_lora", f"no {CONFIG_FILE}")

"""Low-rank deltas for mask rows: PEFT's format, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bita_vllm.adapter import AdapterError
from bita_vllm.training.mask_lora import CONFIG_FILE, WEIGHTS_FILE, MaskLora


@pytest.fixture
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)


def filled(base, **options):
    lora = MaskLora.for_model(base, 4, alpha=8, **options)
    for index, b in enumerate(lora.lora_b):
        b.data.normal_(generator=torch.Generator().manual_seed(index))
    return lora


def test_saved_in_pefts_format(base, tmp_path):
    filled(base, targets=["q_proj", "down_proj"], layers=[0, 2]).save(tmp_path, base)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["layers_to_transform"] == [0, 2]
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight": shape
        for layer in (0, 2)
        for module, part, shape in (
            ("self_attn.q_proj", "A", (4, 128)),
            ("self_attn.q_proj", "B", (128, 4)),
            ("mlp.down_proj", "A", (4, 256)),
            ("mlp.down_proj", "B", (128, 4)),
        )
    }


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("phi3", "down_proj,gate_up_proj,o_proj,qkv_proj"),
        ("gpt2", "c_attn,c_fc,c_proj"),
        ("opt", "fc1,fc2,k_proj,out_proj,q_proj,v_proj"),
        ("mixtral", "k_proj,o_proj,q_proj,v_proj"),
    ],
)
def test_all_linear_layers_of_the_decoder_by_their_own_names(tiny_model, architecture, kinds):
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    assert f"{kinds} in layers [0, 1, 2]" in str(MaskLora.for_model(base, 2))


def test_loading_gives_back_what_was_saved(base, tmp_path):
    lora = filled(base)
    lora.save(tmp_path, base)
    loaded = MaskLora.load(tmp_path, base)
    assert (loaded.rank, loaded.alpha, loaded.module_names) == (4, 8.0, lora.module_names)
    for saved, back in zip(lora.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(back, saved, rtol=0, atol=0)


def test_a_merged_delta_is_the_definition(base):
    """The hook's output is the linear layer's with W + alpha/rank * B A; without it, with W."""
    lora = filled(base, targets=["o_proj"], layers=[1])
    lora.attach(base)
    layer = base.model.layers[1].self_attn.o_proj
    x = torch.randn(5, 128)
    merged = layer.weight + 2 * lora.lora_b[0] @ lora.lora_a[0]
    torch.testing.assert_close(layer(x), x @ merged.T)
    lora.enabled = False
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "must be at least 1, not 0"),
        ({"rank": 2, "targets": ["qkv_proj"]}, "no linear layer called qkv_proj"),
        ({"rank": 2, "layers": [7]}, "has layers 0..2"),
    ],
    ids=["rank", "target", "layer"],
)
def test_what_the_model_does_not_have_is_refused(base, options, message):
    with pytest.raises(AdapterError, match=message):
        MaskLora.for_model(base, **options)


def broken_config(folder):
    (folder / CONFIG_FILE).write_text("{}")


def other_module(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 128)
    save_file(tensors, folder / WEIGHTS_FILE)


def wrong_shape(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors[name] = tensors[name][:2].clone()
    save_file(tensors, folder / WEIGHTS_FILE)


def not_finite(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_config, "does not hold low-rank deltas in PEFT's format"),
        (other_module, "has no such linear layer"),
        (wrong_shape, r"has lora_A of model.layers.0.mlp.up_proj with shape \[2, 128\]"),
        (not_finite, "that are NaN or infinite"),
    ],
)
def test_damaged_deltas_are_refused(base, tmp_path, damage, message):
    filled(base).save(tmp_path, base)
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        MaskLora.load(tmp_path, base)

"""Low-rank deltas for mask rows, trainable: where they go, and the way into an adapter and back."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bita_vllm.adapter.config import AdapterError
from bita_vllm.training.mask_lora import MaskLora


@pytest.fixture
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)


def filled(base, **options):
    lora = MaskLora.for_model(base, 4, alpha=8, **options)
    for index, b in enumerate(lora.lora_b):
        b.data.normal_(generator=torch.Generator().manual_seed(index))
    return lora


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


def test_an_adapter_gives_back_what_was_trained(base):
    lora = filled(base, targets=["q_proj", "down_proj"], layers=[0, 2])
    weights = lora.weights(base)
    assert weights.targets == ["down_proj", "q_proj"] and weights.layers == [0, 2]
    # Whatever order a file has them in, the trained parameters are in the model's.
    weights = replace(weights, modules=dict(reversed(weights.modules.items())))
    loaded = MaskLora.from_weights(weights, base)
    assert (loaded.rank, loaded.alpha, loaded.module_names) == (4, 8.0, lora.module_names)
    for trained, back in zip(lora.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(back, trained, rtol=0, atol=0)


def test_half_precision_deltas_train_in_fp32(base):
    weights = filled(base, layers=[1]).weights(base)
    halves = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in weights.modules.items()}
    lora = MaskLora.from_weights(replace(weights, modules=halves), base)
    assert {p.dtype for p in lora.parameters()} == {torch.float32}


def test_a_larger_rank_starts_with_the_same_deltas(base):
    lora = filled(base, targets=["q_proj"])
    before = lora.weights(base)
    lora.grow(6)
    after = MaskLora.from_weights(lora.weights(base), base)
    assert (after.rank, after.alpha, tuple(after.lora_a[0].shape)) == (6, 12.0, (6, 128))
    for (old_a, old_b), a, b in zip(
        before.modules.values(), after.lora_a, after.lora_b, strict=True
    ):
        torch.testing.assert_close(2 * b @ a, 2 * old_b @ old_a)
        assert a[4:].std() > 0.05  # with A at zero too the new directions would never learn
    with pytest.raises(AdapterError, match="have rank 6, but rank 4 was asked for"):
        lora.grow(4)


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


def test_deltas_of_another_model_are_refused(base, tiny_model):
    other = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no such linear layer"):
        MaskLora.from_weights(filled(other).weights(other), base)

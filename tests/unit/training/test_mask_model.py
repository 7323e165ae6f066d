"""MaskModel computes what the plain full-mask formulation computes: loss and gradients, in fp64."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from testbed import naive_training
from testbed.architectures import TRAINED
from transformers import AutoModelForCausalLM

from bita_vllm.adapter.checkpoint import random_adapter
from bita_vllm.adapter.config import AdapterError, ModelShape
from bita_vllm.training import mask_attention, mask_flex
from bita_vllm.training.batches import IGNORED, MaskBatch
from bita_vllm.training.loss import mask_loss
from bita_vllm.training.mask_lora import MaskLora
from bita_vllm.training.mask_model import MaskModel

K, LENGTH = 3, 48


@pytest.fixture
def tiny(tiny_model):
    """Architecture -> a fresh fp64 base model."""

    def make(architecture, **overrides):
        folder = tiny_model(architecture, **overrides)
        # The default way to run experts has no fp64.
        has_experts = architecture in ("mixtral", "gpt_oss")
        options = {"experts_implementation": "eager"} if has_experts else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()

    return make


def make_model(base, *, rank=0, targets=None, layers=None, prompt_tokens=5):
    """A MaskModel with random weights everywhere, the deltas' B too."""
    shape = ModelShape.from_hf_config(base.config)
    adapter = random_adapter(
        shape, K, prompt_tokens, 1, embedding_std=0.3, prompt_std=0.5, dtype=torch.float64
    )
    lora = None
    if rank:
        lora = MaskLora.for_model(base, rank, alpha=2.0 * rank, targets=targets, layers=layers)
        lora = lora.double()
        generator = torch.Generator().manual_seed(2)
        for b in lora.lora_b:
            b.data = 0.05 * torch.randn(b.shape, generator=generator, dtype=torch.float64)
    return MaskModel.from_adapter(base, adapter, lora)


def make_case(seed=3, num_groups=7):
    """Two sequences, groups at random places, some targets missing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (2, LENGTH), generator=generator)
    roots = torch.stack([torch.randperm(LENGTH - 2, generator=generator) for _ in range(2)])
    roots = roots[:, :num_groups]
    wanted = roots[..., None] + 2 + torch.arange(K)
    targets = ids.gather(1, wanted.clamp(max=LENGTH - 1).flatten(1)).view(wanted.shape)
    targets[wanted >= LENGTH] = IGNORED
    targets[0, 2] = IGNORED
    return MaskBatch(ids, roots, targets)


def naive_weights(model):
    """Leaf copies of the model's parameters."""
    leaf = lambda p: p.detach().clone().requires_grad_()  # noqa: E731
    lora = model.lora
    return naive_training.Weights(
        leaf(model.mask_embeddings),
        leaf(model.prompt_keys),
        leaf(model.prompt_values),
        {
            name: (leaf(a), leaf(b), lora.alpha / lora.rank)
            for name, a, b in zip(lora.module_names, lora.lora_a, lora.lora_b, strict=True)
        }
        if lora
        else {},
    )


def pairs(model, weights):
    """(name, trained parameter, naive leaf) of every parameter."""
    yield "mask_embeddings", model.mask_embeddings, weights.mask_embeddings
    yield "prompt_keys", model.prompt_keys, weights.prompt_keys
    yield "prompt_values", model.prompt_values, weights.prompt_values
    if model.lora:
        for name, a, b in zip(
            model.lora.module_names, model.lora.lora_a, model.lora.lora_b, strict=True
        ):
            yield f"{name} A", a, weights.deltas[name][0]
            yield f"{name} B", b, weights.deltas[name][1]


def check_equal_to_naive(
    tiny,
    architecture,
    *,
    batch=None,
    distill=0.5,
    reach_power=0.3,
    checkpointing=False,
    **options,
):
    batch = batch or make_case()
    base = tiny(architecture)
    twin = deepcopy(base)
    model = make_model(base, **options)
    if checkpointing:
        model.checkpoint_activations()
    row_weights = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)

    weights = naive_weights(model)
    token_logits, mask_logits = naive_training.logits(twin, weights, batch.input_ids, batch.roots)
    expected = naive_training.loss(
        token_logits,
        mask_logits,
        batch.roots,
        batch.targets,
        row_weights,
        distill,
        reach_power,
    )
    expected.backward()

    context = model.context(batch.input_ids)
    torch.testing.assert_close(model.logits(context.hidden), token_logits, rtol=0, atol=1e-9)
    hidden = model.mask_hidden(context, batch.roots)
    torch.testing.assert_close(model.logits(hidden), mask_logits, rtol=0, atol=1e-9)
    count = (batch.targets != IGNORED).sum(dim=(0, 1))
    weight_sum = float((count * row_weights).sum())
    result = mask_loss(
        model, context, hidden, batch, row_weights, weight_sum, distill, reach_power, 10
    )
    result.loss.backward()
    assert abs(float(result.loss - expected)) < 1e-10
    for name, mine, naive in pairs(model, weights):
        assert naive.grad.abs().max() > 1e-7, f"{name}: a test of zero against zero"
        torch.testing.assert_close(mine.grad, naive.grad, rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize("architecture", TRAINED)
def test_loss_and_gradients_equal_the_full_mask_formulation(tiny, architecture):
    check_equal_to_naive(tiny, architecture, rank=4)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_each_part_of_the_loss_equals_the_full_mask_formulation(tiny, distill):
    check_equal_to_naive(tiny, "llama", distill=distill)


@pytest.mark.parametrize("reach_power", [0.0, 1.0])
def test_what_a_row_counts_equals_the_full_mask_formulation(tiny, reach_power):
    check_equal_to_naive(tiny, "llama", reach_power=reach_power)


def test_short_texts_whose_groups_hardly_have_a_target(tiny):
    batch = make_case()
    batch.targets[:, :-1] = IGNORED
    check_equal_to_naive(tiny, "llama", batch=batch)


@pytest.mark.parametrize("tile_rows", [3, 7, 12])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_tiles_of_any_size_give_the_same(tiny, monkeypatch, architecture, tile_rows):
    monkeypatch.setattr(mask_attention, "TILE_ROWS", tile_rows)
    check_equal_to_naive(tiny, architecture)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_flex_attention_sees_what_tiles_see(tiny, monkeypatch, architecture):
    """Forward only, uncompiled: on a CPU FlexAttention has no more to offer."""
    model, batch = make_model(tiny(architecture)), make_case()
    context = model.context(batch.input_ids)
    with torch.no_grad():
        expected = model.mask_hidden(context, batch.roots)
        monkeypatch.setattr(mask_attention, "use_flex", lambda query: True)
        hidden = model.mask_hidden(context, batch.roots)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_flex_attention_compiles(tiny, monkeypatch, architecture):
    """Its rule and its softcap, in torch's compiler: on a CPU forward only, but by the same lowering as on a GPU.

    Sinks need the log of the softmax's sum, which torch does not compile for a CPU.
    """
    compiled = torch.compile(mask_flex.flex_attention, dynamic=False)
    model, batch = make_model(tiny(architecture).float()).float(), make_case()
    with torch.no_grad():
        context = model.context(batch.input_ids)
        expected = model.mask_hidden(context, batch.roots)
        monkeypatch.setattr(mask_attention, "use_flex", lambda query: True)
        monkeypatch.setattr(mask_flex, "flex_attention", compiled)
        hidden = model.mask_hidden(context, batch.roots)
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_groups", [7, 46])  # few rows and many have kernels of their own
@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "gemma2", "gpt_oss", "three heads a KV head"]
)
def test_flex_attention_trains_as_tiles_do(tiny, monkeypatch, architecture, num_groups):
    """Compiled, in fp32, gradients too: what `bita train` runs on a GPU."""
    three = {"hidden_size": 192, "num_attention_heads": 6}
    base = tiny("llama", **three) if architecture.startswith("three") else tiny(architecture)
    model, batch = make_model(base.float().cuda(), rank=4).float(), make_case(num_groups=num_groups)
    roots, ids = batch.roots.cuda(), batch.input_ids.cuda()
    outcomes = []
    for flex in (True, False):
        monkeypatch.setattr(mask_attention, "use_flex", lambda query, flex=flex: flex)
        hidden = model.mask_hidden(model.context(ids), roots)
        gradients = torch.autograd.grad(hidden.square().sum(), list(model.parameters()))
        outcomes.append([hidden.detach(), *gradients])
    for got, expected in zip(*outcomes, strict=True):
        assert expected.norm() > 0
        assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_without_prompt_tokens(tiny):
    base = tiny("llama")
    twin = deepcopy(base)
    model, batch = make_model(base, prompt_tokens=0), make_case()
    _, expected = naive_training.logits(twin, naive_weights(model), batch.input_ids, batch.roots)
    logits = model.mask_logits(model.context(batch.input_ids), batch.roots)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_checkpointed_activations_give_the_same_gradients(tiny):
    check_equal_to_naive(tiny, "llama", rank=4, checkpointing=True)


def test_deltas_on_some_layers_and_modules(tiny):
    check_equal_to_naive(tiny, "qwen3", rank=2, targets=["o_proj", "down_proj"], layers=[1, 2])


def test_ordinary_tokens_see_nothing_of_the_adapter(tiny):
    base = tiny("llama")
    batch = make_case()
    with torch.no_grad():
        expected = base(input_ids=batch.input_ids).logits
    model = make_model(base, rank=4)
    model.mask_hidden(model.context(batch.input_ids), batch.roots)
    logits = model.logits(model.context(batch.input_ids).hidden)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_padding_is_never_seen(tiny):
    model, batch = make_model(tiny("llama")), make_case()
    padded = torch.nn.functional.pad(batch.input_ids, (0, 9), value=7)
    expected = model.mask_hidden(model.context(batch.input_ids), batch.roots)
    hidden = model.mask_hidden(model.context(padded), batch.roots)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)


def test_a_base_whose_head_does_more_is_refused(tiny):
    base = tiny("llama")
    base.lm_head.register_forward_hook(lambda module, args, output: output * 1.0)
    forward = base.forward
    base.forward = lambda **kw: SimpleNamespace(logits=forward(**kw).logits * 2)
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM is not supported .* off"):
        make_model(base)


def test_a_real_model_in_bfloat16_is_taken(embedded_model):
    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.bfloat16)
    shape = ModelShape.from_hf_config(base.config)
    model = MaskModel(base, random_adapter(shape, K, 4, 0))
    assert model.dtype == torch.bfloat16


def test_a_base_carries_one_mask_model(tiny):
    base = tiny("llama")
    make_model(base)
    with pytest.raises(AdapterError, match="load it once more"):
        make_model(base)


def test_an_adapter_of_another_model_is_refused(tiny):
    shape = ModelShape.from_hf_config(tiny("llama").config)
    adapter = random_adapter(shape, K, 4, 0)
    with pytest.raises(AdapterError, match="num_layers is 3 in the adapter but 2 in the model"):
        MaskModel.from_adapter(tiny("llama", num_hidden_layers=2), adapter)

"""What happens to layers while the base model is loaded: prompt tokens to their rank, refusals by name."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import QKVParallelLinear

from bita_vllm.attention.cpu import TreeCPUAttentionImpl
from bita_vllm.attention.gpu import TreeTritonAttentionImpl
from bita_vllm.runner.loading import own_kv_heads
from bita_vllm.runner.model_checks import _refuse_layer

HEAD_SIZE, HIDDEN = 4, 8


@pytest.mark.parametrize(
    ("num_heads", "num_ranks"), [(8, 1), (8, 2), (8, 8), (2, 4), (1, 4), (1, 2), (4, 2)]
)
def test_kv_heads_of_a_rank_are_vllms(monkeypatch, num_heads, num_ranks):
    """vLLM's own layer loads a key projection whose rows say which head they belong to."""
    keys = torch.arange(num_heads).repeat_interleave(HEAD_SIZE).float()
    for rank in range(num_ranks):
        monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: num_ranks)
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        from vllm.model_executor import parameter

        for module in (linear, parameter):
            for name, value in (("world_size", num_ranks), ("rank", rank)):
                monkeypatch.setattr(
                    module, f"get_tensor_model_parallel_{name}", lambda value=value: value
                )
        layer = QKVParallelLinear(
            HIDDEN, HEAD_SIZE, 8, num_heads, bias=False, params_dtype=torch.float32
        )
        layer.weight.data.fill_(-1)
        layer.weight_loader(layer.weight, keys[:, None].expand(-1, HIDDEN), "k")
        first = layer.num_heads * HEAD_SIZE
        loaded = layer.weight.data[first : first + layer.num_kv_heads * HEAD_SIZE, 0]
        tokens = keys.view(1, num_heads, HEAD_SIZE)
        assert own_kv_heads(tokens, rank, num_ranks).flatten().tolist() == loaded.tolist()


def layer_of(impl_cls, kv_cache_dtype="auto", **given):
    impl = impl_cls.__new__(impl_cls)
    usual = {"attn_type": "decoder", "alibi_slopes": None, "head_size": 64, "chunk_lookback": -1}
    vars(impl).update({**usual, "kv_sharing_target_layer_name": None, **given})
    return SimpleNamespace(impl=impl, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize(
    ("impl_cls", "given", "feature"),
    [
        (TreeTritonAttentionImpl, {"chunk_lookback": 1}, "attention in chunks"),
        (TreeTritonAttentionImpl, {"alibi_slopes": torch.ones(1)}, "ALiBi"),
        (TreeTritonAttentionImpl, {"kv_cache_dtype": "fp8_e5m2"}, "KV cache of type fp8_e5m2"),
        (TreeCPUAttentionImpl, {"kv_cache_dtype": "fp8"}, "KV cache of type fp8"),
        (TreeCPUAttentionImpl, {"attn_type": "encoder_only"}, "attention of kind encoder_only"),
        (TreeTritonAttentionImpl, {"head_size": 512}, "attention heads of size 512"),
        (TreeTritonAttentionImpl, {"head_size": 72}, "attention heads of size 72"),
        (
            TreeCPUAttentionImpl,
            {"kv_sharing_target_layer_name": "a"},
            "KV caches shared between layers",
        ),
        (TreeTritonAttentionImpl, {"kv_cache_dtype": "fp8"}, None),
        (TreeCPUAttentionImpl, {"head_size": 512}, None),
    ],
)
def test_layers_that_attend_otherwise_are_refused_by_name(impl_cls, given, feature):
    """Also fp8 caches that only the checkpoint asks for."""
    layer = layer_of(impl_cls, **given)
    if feature is None:
        _refuse_layer("model.layers.3.attn", layer, impl_cls)
        return
    with pytest.raises(ValueError, match=f"{feature} .layer model.layers.3.attn"):
        _refuse_layer("model.layers.3.attn", layer, impl_cls)


@pytest.mark.parametrize(
    ("layer", "feature"),
    [
        (SimpleNamespace(), "layers of type SimpleNamespace"),
        (layer_of(TreeTritonAttentionImpl), "attention of type TreeTritonAttentionImpl"),
    ],
)
def test_layers_of_another_kind_are_refused_by_name(layer, feature):
    with pytest.raises(ValueError, match=f"{feature} .layer model.layers.3.attn"):
        _refuse_layer("model.layers.3.attn", layer, TreeCPUAttentionImpl)

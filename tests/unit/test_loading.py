"""Prompt tokens lie on the tensor-parallel rank that has their KV head in vLLM."""

import pytest
import torch
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import QKVParallelLinear

from bita_vllm.runner.loading import own_kv_heads

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

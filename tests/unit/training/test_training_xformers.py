"""The xFormers arm of benchmarks/training_throughput.py: same attention and gradients as the trainer's own.

Its operators need CUDA, so a plain softmax of the same signature stands in for them.
"""

import pytest
import torch
from training_xformers import in_place_of_flex

from bita_vllm.training.mask_attention import MaskPass


def softmax_attention(query, key, value, attn_bias, scale):
    scores = torch.einsum("bmhd,bkhd->bhmk", query, key) * scale + attn_bias
    return torch.einsum("bhmk,bkhd->bmhd", scores.softmax(-1), value)


@pytest.mark.parametrize("window", [None, 7], ids=["no window", "window 7"])
def test_attention_and_gradients_are_the_trainers(window):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, groups, k, heads, kv_heads, size, length, prompt = 2, 5, 3, 4, 2, 8, 20, 6
    roots = torch.stack(
        [torch.randperm(length, generator=generator)[:groups].sort().values for _ in range(batch)]
    )
    results = []
    fixed = [normal(batch, kv_heads, length, size) for _ in range(2)]
    values = [
        normal(batch, heads, groups * k, size),
        *(normal(batch, kv_heads, groups * k, size) for _ in range(2)),
        *(normal(1, prompt, kv_heads, size) for _ in range(2)),
    ]
    upstream = normal(batch, heads, groups * k, size)
    for ours in (True, False):
        query, key, value, front_keys, front_values = (x.clone().requires_grad_() for x in values)
        step = MaskPass([fixed[0]], [fixed[1]], front_keys, front_values, roots, k)
        if ours:
            out = step.attend(0, query, key, value, 0.3, window, None, None)
        else:
            with in_place_of_flex(softmax_attention):
                out = step.attend(0, query, key, value, 0.3, window, None, None)
        out.backward(upstream)
        results.append([out, *(x.grad for x in (query, key, value, front_keys, front_values))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_softcap_is_refused():
    with in_place_of_flex(softmax_attention), pytest.raises(NotImplementedError, match="softcap"):
        step = MaskPass(
            [torch.zeros(1, 1, 4, 8)], [torch.zeros(1, 1, 4, 8)], torch.zeros(1, 2, 1, 8),
            torch.zeros(1, 2, 1, 8), torch.tensor([[1]]), 3,
        )  # fmt: skip
        step.attend(0, *(torch.zeros(1, 1, 3, 8) for _ in range(3)), 1.0, None, 30.0, None)

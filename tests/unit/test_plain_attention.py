"""Which layers hand rows of no block to FlashAttention: those that vLLM's own gates let in, and no other."""

from types import SimpleNamespace

import pytest
import torch
from naive_flash import NaiveFlash
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from bita_vllm.attention import plain
from bita_vllm.attention.gpu import TreeTritonAttentionImpl
from bita_vllm.attention.gpu_metadata import StepMetadata

LAYER = {
    "num_heads": 4,
    "head_size": 64,
    "scale": 0.125,
    "num_kv_heads": 2,
    "alibi_slopes": None,
    "sliding_window": (-1, -1),
    "kv_cache_dtype": "auto",
    "logits_soft_cap": 0,
    "attn_type": "decoder",
    "sinks": None,
}


@pytest.fixture
def choose(monkeypatch):
    """`flash_attention` for a layer on a pretended GPU; also the reasons against it."""

    def factory(dtype=torch.bfloat16, block_size=16, capability=(9, 0), version=3, **layer):
        device = None if capability is None else DeviceCapability(*capability)
        here = SimpleNamespace(get_device_capability=lambda: device)
        monkeypatch.setattr(plain, "current_platform", here)
        monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **options: version)
        sinks = version in (3, 4)
        monkeypatch.setattr(flash_attn, "is_flash_attn_varlen_func_available", lambda: True)
        monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: sinks, raising=False)
        said = []
        monkeypatch.setattr(plain.logger, "info_once", lambda text, *a: said.append(text % a))
        found = plain.flash_attention(SimpleNamespace(**{**LAYER, **layer}), dtype, block_size)
        assert len(said) == 1
        return found, said[0]

    return factory


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"capability": (8, 0), "version": 2, "dtype": torch.float16},
        {"head_size": 256, "block_size": 784},
        {"sliding_window": (31, 0), "logits_soft_cap": 5.0},
        {"sinks": torch.zeros(4, dtype=torch.bfloat16)},
    ],
    ids=["Hopper", "Ampere, fp16", "large heads and blocks", "window, softcap", "sinks"],
)
def test_layer_that_fits_gets_vllms_flash_attention(choose, layer):
    flash, said = choose(**layer)
    assert isinstance(flash, flash_attn.FlashAttentionImpl)
    assert flash.vllm_flash_attn_version == layer.get("version", 3)
    assert f"FlashAttention {flash.vllm_flash_attn_version}" in said
    expected = {**LAYER, **layer}
    for name in ("num_heads", "num_kv_heads", "head_size", "scale", "sliding_window", "sinks"):
        assert getattr(flash, name) is expected[name] or getattr(flash, name) == expected[name]
    assert flash.logits_soft_cap == expected["logits_soft_cap"]


DOUBTS = {
    "CPU": ({"capability": None}, "no CUDA device"),
    "Turing": ({"capability": (7, 5)}, "compute capability"),
    "fp32": ({"dtype": torch.float32}, "dtype"),
    "head size": ({"head_size": 84}, "head_size"),
    "too large a head": ({"head_size": 288}, "head_size"),
    "block size": ({"block_size": 24}, "block_size"),
    "fp8 cache": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8"),
    "another cache": ({"kv_cache_dtype": "float16"}, "kv_cache_dtype float16"),
    "ALiBi": ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
    "cross attention": ({"attn_type": "other"}, "attention type"),
    "sinks without FA3": (
        {"sinks": torch.zeros(4, dtype=torch.bfloat16), "version": 2},
        "attention sinks",
    ),
    "sinks on Ampere": (
        {"sinks": torch.zeros(4, dtype=torch.bfloat16), "capability": (8, 0)},
        "sink",
    ),
    "fp16 sinks": ({"sinks": torch.zeros(4, dtype=torch.float16)}, "sinks in torch.float16"),
    "FlashAttention 4": ({"capability": (10, 0), "version": 4}, "version here is 4"),
    "no FlashAttention": ({"version": None}, "version here is None"),
}


@pytest.mark.parametrize(("layer", "fact"), DOUBTS.values(), ids=DOUBTS)
def test_any_doubt_leaves_plain_rows_in_triton(choose, layer, fact):
    flash, said = choose(**layer)
    assert flash is None
    assert fact in said and "Triton" in said


@pytest.mark.parametrize("in_flash", [False, True])
@pytest.mark.parametrize("num_block_rows", [None, 4])
def test_all_rows_but_those_of_blocks_run_in_vllms_own_backend(
    monkeypatch, in_flash, num_block_rows
):
    calls = []
    impl = TreeTritonAttentionImpl.__new__(TreeTritonAttentionImpl)
    flash = SimpleNamespace(forward=lambda layer, *given: calls.append(("FlashAttention", given)))
    impl.flash = flash if in_flash else None

    def in_triton(self, layer, *given):
        calls.append(("Triton", given))

    def blocks_run(self, layer, query, kv_cache, blocks, output):
        calls.append(("blocks", (blocks.num_rows,)))

    monkeypatch.setattr(TritonAttentionImpl, "forward", in_triton)
    monkeypatch.setattr(TreeTritonAttentionImpl, "_attend_blocks", blocks_run)
    blocks = None if num_block_rows is None else SimpleNamespace(num_rows=num_block_rows)
    query, output, own = torch.zeros(9, 1, 16), torch.zeros(9, 1, 16), object()
    metadata = StepMetadata(blocks, own, in_flash)
    assert impl.forward(None, query, None, None, None, metadata, output) is output
    assert [name for name, _ in calls] == ["blocks"] * (blocks is not None) + [
        "FlashAttention" if in_flash else "Triton"
    ]
    _, (plain_query, _, _, _, plain_metadata, plain_output, *_) = calls[-1]
    first = num_block_rows or 0
    assert plain_metadata is own
    assert plain_query.data_ptr() == query[first:].data_ptr() and len(plain_query) == 9 - first
    assert plain_output.data_ptr() == output[first:].data_ptr() and len(plain_output) == 9 - first


def test_profile_run_computes_nothing():
    impl = TreeTritonAttentionImpl.__new__(TreeTritonAttentionImpl)
    output = torch.ones(3, 1, 16)
    assert impl.forward(None, None, None, None, None, None, output) is output and not output.any()


def test_batch_invariance_leaves_plain_rows_in_triton(choose, monkeypatch):
    monkeypatch.setattr(plain.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    flash, said = choose()
    assert flash is None and "VLLM_BATCH_INVARIANT" in said


def test_flash_attention_that_does_not_import_leaves_plain_rows_in_triton(choose, monkeypatch):
    monkeypatch.delattr(flash_attn, "FlashAttentionBackend")
    flash, said = choose()
    assert flash is None and "FlashAttentionBackend" in said


@pytest.mark.parametrize("layout", ["heads first", "slots first"])
def test_call_reads_the_cache_that_the_triton_backend_wrote(choose, monkeypatch, layout):
    """A chunk after a context, and one without; arguments as vLLM's function takes them."""
    naive = NaiveFlash()
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", naive, raising=False)
    flash, _ = choose(sliding_window=(6, 0))
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(5, 2, 16, 128, generator=generator)  # [num_blocks, Hkv, block_size, 2 * D]
    if layout == "slots first":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    query = torch.randn(9, 4, 64, generator=generator)
    block_table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    scale = torch.ones(())
    layer = SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale)
    metadata = SimpleNamespace(
        num_actual_tokens=8,
        max_query_len=5,
        query_start_loc=torch.tensor([0, 5, 8], dtype=torch.int32),
        max_seq_len=32,
        seq_lens=torch.tensor([20, 3], dtype=torch.int32),
        block_table=block_table,
        slot_mapping=torch.arange(8),
        causal=True,
    )
    output = torch.full((9, 4, 64), float("nan"))
    scheduled = {"scheduler_metadata": None, "max_num_splits": 0}
    shared = flash_attn.FlashAttentionMetadata(**vars(metadata), **scheduled)
    result = flash.forward(layer, query, None, None, cache, shared, output)
    assert result is output and output[8].isnan().all()
    (call,) = naive.calls
    assert (call["num_splits"], call["fa_version"]) == (0, 3)
    for request, (first, length) in enumerate(((15, 20), (0, 3))):
        for row in range(first, length):
            slots = torch.arange(max(0, row - 6), row + 1)
            pages = block_table[request, slots // 16].long(), slots % 16
            rows = cache.transpose(1, 2)[pages]  # [slots, Hkv, 2 * D]
            keys, values = (t.repeat_interleave(2, dim=1) for t in rows.split(64, dim=-1))
            q = query[(0, 5)[request] + row - first]
            weights = (torch.einsum("hd,shd->hs", q, keys) * 0.125).softmax(dim=1)
            expected = torch.einsum("hs,shd->hd", weights, values)
            assert torch.allclose(output[(0, 5)[request] + row - first], expected, atol=1e-5)

"""Stand-ins for vLLM's FlashAttention 3, whose kernels need CUDA: its signatures, naive arithmetic."""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from testbed import v2_on_cpu
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import flash_attn


def put_in_flash_attention(patch: pytest.MonkeyPatch) -> NaiveFlash:
    """vLLM's FlashAttention backend runs here, as on a Hopper GPU, and bita takes it; it also takes fp32."""
    from bita_vllm.attention import plain

    naive = NaiveFlash()
    here = SimpleNamespace(get_device_capability=lambda: DeviceCapability(9, 0))
    patch.setattr(plain, "current_platform", here)
    patch.setattr(flash_attn, "get_flash_attn_version", lambda **layer: 3)
    patch.setattr(flash_attn.FlashAttentionBackend, "supported_dtypes", [torch.float32])
    patch.setattr(flash_attn, "flash_attn_varlen_func", naive, raising=False)
    patch.setattr(flash_attn, "get_scheduler_metadata", naive.schedule, raising=False)
    patch.setattr(flash_attn, "reshape_and_cache_flash", v2_on_cpu.write_kv, raising=False)
    return naive


def vllms_signature(name: str) -> inspect.Signature:
    """The real function's, from its file: the package around it does not import without CUDA."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return inspect.signature(getattr(module, name))


class NaiveFlash:
    """Callable in place of `flash_attn_varlen_func`; `calls` holds the arguments of every call, by name.

    `schedules` holds those of `get_scheduler_metadata`.
    """

    # what a causal call over pages may leave at its default only
    UNUSED = ("alibi_slopes", "dropout_p", "q_v", "cu_seqlens_k", "output_scale", "mask_mod",
              "block_sparse_tensors", "aux_tensors", "dynamic_causal", "cp_world_size")  # fmt: skip

    def __init__(self) -> None:
        self.signature = vllms_signature("flash_attn_varlen_func")
        self._schedule = vllms_signature("get_scheduler_metadata")
        self.calls: list[dict[str, Any]] = []
        self.schedules: list[dict[str, Any]] = []

    def schedule(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Numbers that say which call made them, as many as FlashAttention 3 makes."""
        bound = self._schedule.bind(*args, **kwargs)
        bound.apply_defaults()
        self.schedules.append(bound.arguments)
        size = 1 + -(-bound.arguments["batch_size"] // 4) * 16
        return torch.full((size,), len(self.schedules), dtype=torch.int32)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name in self.UNUSED:
            default = self.signature.parameters[name].default
            assert given[name] == default, name
        assert given["causal"] is True
        self.calls.append(given)
        self._check_schedule(given)
        out = given["out"]
        starts, lengths = given["cu_seqlens_q"].tolist(), given["seqused_k"].tolist()
        assert len(starts) == len(lengths) + 1 == len(given["block_table"]) + 1
        for request, length in enumerate(lengths):
            rows = slice(starts[request], starts[request + 1])
            assert 0 < rows.stop - rows.start <= given["max_seqlen_q"]
            assert length <= given["max_seqlen_k"]
            out[rows] = self._attend(given, given["q"][rows], request, length)
        return out

    def _check_schedule(self, given: dict[str, Any]) -> None:
        """FlashAttention 3 gets the metadata of this very step."""
        metadata = given["scheduler_metadata"]
        if metadata is None:
            return
        schedule = self.schedules[int(metadata[0]) - 1]
        assert schedule["batch_size"] == len(given["seqused_k"])
        assert schedule["cache_seqlens"] is given["seqused_k"]
        assert schedule["cu_seqlens_q"] is given["cu_seqlens_q"]
        for name in ("max_seqlen_q", "max_seqlen_k", "num_splits"):
            assert schedule[name] == given[name], name

    @staticmethod
    def _attend(
        given: dict[str, Any],
        # [n, Hq, D]
        query: torch.Tensor,
        request: int,
        length: int,
    ) -> torch.Tensor:
        block_size = given["k"].shape[1]
        slots = torch.arange(length)
        pages = given["block_table"][request, slots // block_size].long(), slots % block_size
        group = query.shape[1] // given["k"].shape[2]
        # [length, Hq, D]
        keys, values = (given[n][pages].repeat_interleave(group, dim=1) for n in ("k", "v"))
        logits = torch.einsum("nhd,shd->hns", query, keys) * given["softmax_scale"]
        if given["softcap"]:
            logits = given["softcap"] * torch.tanh(logits / given["softcap"])
        behind = torch.arange(length - len(query), length)[:, None] - slots
        left = (given["window_size"] or [-1])[0]
        visible = (behind >= 0) & ((behind <= left) if left >= 0 else True)
        weights = logits.masked_fill(~visible, -math.inf).softmax(dim=2)
        return torch.einsum("hns,shd->nhd", weights, values)

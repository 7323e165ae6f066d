"""The peers of kernel_benchmark.py: what we hand them, with naive arithmetic in place of their CUDA kernels."""

import sys
from types import ModuleType

import kernel_peers
import pytest
import torch
from kernel_cases import BLOCK_SIZE, SHAPES, Case
from naive_flash import NaiveFlash

ROWS = pytest.mark.parametrize("num_rows", [1, 16], ids=["R1", "R16"])


@pytest.fixture(autouse=True)
def on_this_cpu(monkeypatch):
    monkeypatch.setattr(kernel_peers, "need_cuda", lambda case: None)


def case(num_rows: int, dtype: torch.dtype = torch.float64) -> Case:
    """Three requests whose slots end inside a page."""
    return Case(SHAPES["SmolLM2-135M"], 37, 3, num_rows, dtype, torch.device("cpu"))


def module(monkeypatch, name: str, **content) -> None:
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


class ScheduledFlash(NaiveFlash):
    """As NaiveFlash, with a schedule made ahead."""

    UNUSED = tuple(name for name in NaiveFlash.UNUSED if name != "scheduler_metadata")


@ROWS
def test_flash_attention_3_is_called_with_vllms_arguments(monkeypatch, num_rows):
    flash, schedules = ScheduledFlash(), []

    def scheduled(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        qkv_dtype, cu_seqlens_q, page_size, causal, num_splits,
    ):  # fmt: skip
        given = dict(locals())
        for name in ("flash", "schedules"):
            given.pop(name)
        schedules.append((batch_size, page_size, causal, num_splits, cu_seqlens_q.tolist()))
        return flash.schedule(**given)

    module(
        monkeypatch,
        "vllm.vllm_flash_attn",
        flash_attn_varlen_func=flash,
        get_scheduler_metadata=scheduled,
        is_fa_version_supported=lambda version: version == 3,
    )
    given = case(num_rows)
    output = kernel_peers.flash_attention_3(given)(0)
    assert given.error(output, causal=True) < 1e-12
    (call,) = flash.calls
    assert call["fa_version"] == 3
    assert call["num_splits"] == schedules[0][3] == kernel_peers.FLASH_SPLITS
    assert schedules == [(3, BLOCK_SIZE, True, 32, [0, num_rows, 2 * num_rows, 3 * num_rows])]


class NaiveFlashInfer:
    """FlashInfer's wrappers of 0.7.2 to 0.7.4, as far as they are used, in plain torch."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False):
        assert kv_layout == "NHD"

    def run(self, q, paged_kv_cache):
        pages, indices, last, mask = self.table
        keys, values = paged_kv_cache
        outputs, start = [], 0
        for i, rows in enumerate(self.rows):
            own = indices[pages[i] : pages[i + 1]].long()
            slots = (len(own) - 1) * BLOCK_SIZE + int(last[i])
            k, v = (
                x[own].flatten(0, 1)[:slots].repeat_interleave(3, dim=1) for x in (keys, values)
            )
            scores = torch.einsum("mhd,nhd->hmn", q[start : start + rows], k) * self.scale
            if mask is not None:
                size = rows * slots
                scores.masked_fill_(~mask[i * size : (i + 1) * size].view(rows, slots), -torch.inf)
            outputs.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v))
            start += rows
        return torch.cat(outputs)


class NaiveDecode(NaiveFlashInfer):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        *, q_data_type, kv_data_type, sm_scale,
    ):  # fmt: skip
        self.rows, self.scale = [1] * (len(indptr) - 1), sm_scale
        self.table = indptr.tolist(), indices, last_page_len, None


class NaivePrefill(NaiveFlashInfer):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, custom_mask, sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert custom_mask.dtype == torch.bool and custom_mask.dim() == 1
        self.rows, self.scale = qo_indptr.diff().tolist(), sm_scale
        self.table = paged_kv_indptr.tolist(), paged_kv_indices, paged_kv_last_page_len, custom_mask


@ROWS
def test_flashinfer_gets_pages_and_the_trees_mask(monkeypatch, num_rows):
    module(
        monkeypatch,
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=NaiveDecode,
        BatchPrefillWithPagedKVCacheWrapper=NaivePrefill,
    )
    monkeypatch.setattr(kernel_peers, "FLASHINFER_WORKSPACE", 8)
    given = case(num_rows)
    assert given.error(kernel_peers.flashinfer(given)(0)) < 1e-12


@ROWS
def test_xformers_tree_attention_gets_a_paged_prefix_and_the_tree(monkeypatch, num_rows):
    """Its two operators need CUDA; layouts, biases and the merge are its own code's."""
    tree_attention = pytest.importorskip("xformers.ops.tree_attention")

    def prefix(q, k, v, attn_bias, op):
        _, rows, groups, heads, size = q.shape
        out, lse = torch.empty_like(q), q.new_empty(groups, heads, rows)
        lengths = attn_bias.k_seqinfo.seqlen.tolist()
        each = rows // len(lengths)
        for i, length in enumerate(lengths):
            pages = attn_bias.block_tables[i].long()[:, None] * attn_bias.page_size
            slots = (pages + torch.arange(attn_bias.page_size)).flatten()[:length]
            own = slice(i * each, (i + 1) * each)
            scores = torch.einsum("mghd,nghd->ghmn", q[0, own], k[0, slots]) * size**-0.5
            lse[..., own] = scores.logsumexp(-1)
            out[0, own] = torch.einsum("ghmn,nghd->mghd", scores.softmax(-1), v[0, slots])
        return out, lse

    def suffix(q, k, v, attn_bias, op):
        scores = torch.einsum("bmghd,bnghd->bghmn", q, k) * q.shape[-1] ** -0.5 + attn_bias
        return torch.einsum("bghmn,bnghd->bmghd", scores.softmax(-1), v), scores.logsumexp(-1)

    def merge(outputs, lses, output_dtype):
        weights = torch.stack(lses).softmax(0).permute(0, 1, 4, 2, 3)[..., None]
        return (torch.stack(outputs) * weights).sum(0), None

    for name, function in (
        ("memory_efficient_attention_partial", prefix),
        ("memory_efficient_attention_forward_requires_grad", suffix),
        ("merge_attentions", merge),
    ):
        monkeypatch.setattr(tree_attention, name, function)
    given = case(num_rows)
    assert given.error(kernel_peers.xformers(given)(0)) < 1e-12


@pytest.mark.parametrize("name", ["flash_attention_3", "flashinfer", "xformers"])
def test_a_peer_that_is_not_installed_is_unavailable(monkeypatch, name):
    for package in ("vllm.vllm_flash_attn", "flashinfer", "xformers", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(kernel_peers.Unavailable, match="does not import"):
        getattr(kernel_peers, name)(case(4, torch.float16))

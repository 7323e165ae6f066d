"""Steps in which prefill meets blocks, and plain steps of an engine with bita; `pytest --runner gpu`.

Blocks, and nothing else, go to tree attention; all other rows get what plain vLLM would call. Tokens stay plain V2's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter, metric, run
from e2e.inspection import known, oracle
from e2e.kernel_launches import recorded_launches
from naive_flash import put_in_flash_attention
from testbed.engines import ON_GPU_RUNNER, engine
from tree_tools import sets_of_one
from vllm import SamplingParams
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.warmup import warmup_kernels

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.attention import gpu
from bita_vllm.runner import gpu as gpu_runner
from bita_vllm.runner import gpu_deltas as gpu_mask_lora
from bita_vllm.runner.loading import attention_backend
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder
from bita_vllm.tree.template_set import TemplateSet, saved_sets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
SHIPPED = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "block_size": 32,
    "num_gpu_blocks_override": 7,
}
PLACE = AttentionBackendEnum.CPU_ATTN  # vLLM's own on this platform


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)


def requests(lengths=(5, 70, 20, 28, 40, 60), max_tokens=20, **sampling):
    rng = np.random.default_rng(0)
    sampling = {"temperature": 0, **sampling}
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    return [(rng.integers(3, 500, length).tolist(), params) for length in lengths]


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def adapter_with(model, folder, sets, ranges=None, **options):
    """An adapter with a ladder of its own next to it."""
    adapter = make_adapter(model, folder, **options)
    ladder = Ladder.fixed(sets[0]) if ranges is None else Ladder(sets, ranges)
    ladder.save(adapter / LADDER_FILE)
    return {"model": str(adapter)}


@dataclass
class TreeCall:
    """Rows that tree attention got in a layer, those of the step, and whose they are."""

    rows: int
    step_rows: int
    lines: list[int]
    rows_each: list[int]
    max_query_len: int
    max_seq_len: int
    seq_lens: list[int]


@pytest.fixture
def tree_calls(monkeypatch):
    calls, forward = [], gpu.TreeTritonAttentionImpl.forward
    attend, step_rows = gpu.tree_attention, [0]

    def attending(query, *args, max_query_len, max_seq_len, **kwargs):
        _, _, _, query_start, seq_lens, line, *_ = args
        rows_each = query_start.diff().tolist()
        sizes = max_query_len, max_seq_len, seq_lens.tolist()
        calls.append(TreeCall(len(query), step_rows[0], line.tolist(), rows_each, *sizes))
        attend(query, *args, max_query_len=max_query_len, max_seq_len=max_seq_len, **kwargs)

    def forwarding(self, layer, query, *args, **kwargs):
        step_rows[0] = len(query)
        return forward(self, layer, query, *args, **kwargs)

    monkeypatch.setattr(gpu, "tree_attention", attending)
    monkeypatch.setattr(gpu.TreeTritonAttentionImpl, "forward", forwarding)
    return calls


@pytest.mark.parametrize("backend", ["Triton", "FlashAttention"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"]
)
def test_mixed_steps_give_plain_tokens(model, tmp_path, monkeypatch, tree_calls, backend, sampling):
    """The shipped adapter's own trees; chunks of a prefill next to blocks, preemption, hits in the prefix cache."""
    asked = requests(**sampling)
    plain = run(model, asked, **OPTIONS)
    trees = saved_sets(AdapterConfig.load(SHIPPED).acceptance)[8]
    bita = adapter_with(model, tmp_path / "adapter", [trees], lora_rank=4)
    if backend == "FlashAttention":
        put_in_flash_attention(monkeypatch)
    with (
        oracle(known(plain)),
        recorded_launches() as seen,
        engine(model, bita, **OPTIONS) as llm,
    ):
        before = metric(llm, "num_preemptions"), metric(llm, "prefix_cache_hits")
        outputs = generate(llm, asked)
        generate(llm, asked[5:])
        again = generate(llm, [asked[5], asked[0]])  # the first one's prompt is in the prefix cache
        preempted = metric(llm, "num_preemptions") - before[0]
        hits = metric(llm, "prefix_cache_hits") - before[1]
    assert tokens_of(outputs) == tokens_of(plain)
    assert tokens_of(again) == tokens_of([plain[5], plain[0]])
    mixed = [call for call in tree_calls if call.rows < call.step_rows]
    print(
        f"{len(tree_calls)} calls, {len(mixed)} in mixed steps; {preempted} preempted, {hits} hits"
    )
    print(seen.programs, seen.idle)
    assert len(mixed) > 4 and preempted > 0 and hits > 0
    for call in tree_calls:
        assert min(call.lines) >= 0, "a request without a block"
        assert call.rows == sum(call.rows_each) and call.max_query_len == max(call.rows_each)
        assert call.max_seq_len >= max(call.seq_lens)
    assert seen.programs["tree_attention_kernel"] > 0
    assert seen.idle["tree_attention_kernel"] == 0


WIDTH = Template.from_widths([2], 3)  # 12 rows
OURS = re.compile("tree_attention|combine_splits|_(accept|build|rank|move|shrink|expand)")
INPUTS = ("seq_lens_ptr", "block_tables_ptr", "query_start_len_ptr")  # of vLLM's Triton attention


def described(value: Any) -> Any:
    """An argument as far as two engines can agree on it: small tensors by value, caches and rows by shape."""
    if not torch.is_tensor(value):
        return value
    integers = value.dtype in (torch.int32, torch.int64)
    return value.dtype, tuple(value.shape), value.stride(), value.tolist() if integers else None


def recorded(monkeypatch, owner, name, calls):
    original = getattr(owner, name)

    def recording(*args, **kwargs):
        calls.append(
            (name, [described(v) for v in args], {k: described(v) for k, v in kwargs.items()})
        )
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recording, raising=False)


def runner_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def to_capture(runner, full, num_requests, rows_each=1):
    """Metadata and slots, as vLLM prepares them to capture a graph."""
    return prepare_inputs_to_capture(
        num_requests,
        num_requests * rows_each,
        runner.model_state,
        runner.input_buffers,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        full_cudagraph=full,
        max_query_len=rows_each,
    )


def captured_metadata(*args):
    """Of the first layer."""
    return next(iter(to_capture(*args).attn_metadata.values()))


def run_as_captured(runner, num_requests, rows_each):
    """The forward pass that vLLM captures in a FULL graph."""
    metadata, slot_mappings = to_capture(runner, True, num_requests, rows_each)
    rows, buffers = num_requests * rows_each, runner.input_buffers
    context = set_forward_context(
        metadata, runner.vllm_config, num_tokens=rows, slot_mapping=slot_mappings
    )
    with torch.inference_mode(), context:
        runner.model(input_ids=buffers.input_ids[:rows], positions=buffers.positions[:rows])


@pytest.mark.parametrize("backend", ["Triton", "FlashAttention"])
def test_plain_steps_call_what_plain_vllm_calls(model, tmp_path, monkeypatch, backend):
    """Prefill in chunks, prefill next to decoding, decoding; call by call, and what a FULL graph would hold."""
    asked = requests((5, 70, 20))
    ranges = [(1, 3, 0), (4, 4, WIDTH.width)]
    bita = adapter_with(model, tmp_path / "adapter", sets_of_one([WIDTH]), ranges, lora_rank=4)
    calls: list[Any] = []
    stock: Any = triton_attn.TritonAttentionBackend
    naive = None
    if backend == "FlashAttention":
        naive = put_in_flash_attention(monkeypatch)
        from vllm.v1.attention.backends import flash_attn

        stock = flash_attn.FlashAttentionBackend
        for name in ("flash_attn_varlen_func", "get_scheduler_metadata", "reshape_and_cache_flash"):
            recorded(monkeypatch, flash_attn, name, calls)
    else:
        recorded(monkeypatch, triton_attn, "unified_attention", calls)
    deltas: list[Any] = []
    recorded(monkeypatch, gpu_mask_lora, "add_mask_lora", deltas)

    def served(speculative):
        with engine(model, speculative, **{**OPTIONS, "num_gpu_blocks_override": 16}) as llm:
            calls.clear()
            deltas.clear()
            if naive is not None:
                naive.schedules.clear()
            outputs, own = generate(llm, asked), list(calls)
            graphs = [captured_metadata(runner_of(llm), True, n) for n in (1, 2, 4)]
            return tokens_of(outputs), own, graphs

    with attention_backend(PLACE, stock):
        plain = served(None)
    ours = served(bita)
    assert not deltas, "a plain step computes deltas"
    assert ours[0] == plain[0]
    assert len(plain[1]) > 20
    for theirs, own in zip_longest(plain[1], ours[1]):
        for a, b in zip_longest(own, theirs):
            assert a == b
    for theirs, own in zip(plain[2], ours[2], strict=True):
        assert own.blocks is None and not own.may_have_mask_rows
        assert type(own.plain) is type(theirs)
        for each in fields(theirs):
            pair = described(getattr(own.plain, each.name)), described(getattr(theirs, each.name))
            assert pair[0] == pair[1], each.name


def test_only_graphs_of_steps_with_blocks_hold_deltas(model, tmp_path):
    bita = adapter_with(model, tmp_path / "adapter", sets_of_one([WIDTH]), lora_rank=4)
    with engine(model, bita, **OPTIONS) as llm:
        runner = runner_of(llm)
        full = captured_metadata(runner, True, 2, WIDTH.num_rows)
        assert full.may_have_mask_rows and full.plain is None
        assert full.blocks.num_rows == 2 * WIDTH.num_rows
        line = runner.model_state.trees.line
        assert full.blocks.line.data_ptr() == line.data_ptr(), "not what the next step writes"
        for captures in (False, True):
            runner.model_state.captures_deltas = captures
            piecewise = captured_metadata(runner, False, 2, 3)
            assert piecewise.may_have_mask_rows is captures and piecewise.blocks is None


@pytest.mark.parametrize("block_size", [32, 64])
def test_warm_up_compiles_all_that_serving_launches(model, tmp_path, monkeypatch, block_size):
    """vLLM's own warm-up, and FULL graphs; then decoding, prefill in chunks, and prefill next to blocks.

    Its Triton attention has variants by the number of requests, in plain vLLM, too: it must only get no others,
    by where its arguments begin.
    """
    workspaces = import_module(gpu_runner.SharedWorkspaces.__module__)
    monkeypatch.setattr(workspaces, "num_processors", lambda device: 132)
    trees = TemplateSet((WIDTH, Template.build([(0, 0), (1, 0)], {0: 3, 1: 2})))
    bita = adapter_with(model, tmp_path / "adapter", [trees], lora_rank=4)
    # Rows of the block table are 24 bytes apart with the larger blocks.
    sizes = {
        "max_model_len": 5 * block_size,
        "block_size": block_size,
        "num_gpu_blocks_override": 40,
    }
    with engine(model, bita, **{**OPTIONS, **sizes}) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        with recorded_launches() as warm:
            warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
            for n in (1, 2, 4):
                run_as_captured(worker.model_runner, n, WIDTH.num_rows)
        with recorded_launches() as serving:
            generate(llm, requests((5, 140, 20, 9, 40), max_tokens=8))
    stock = [key for key in serving.keys if key[0] == "kernel_unified_attention"]
    assert stock and all((name, torch.int32, False) not in key for key in stock for name in INPUTS)
    new = sorted(key for key in serving.keys - warm.keys if OURS.match(key[0]))
    names = {key[0] for key in serving.keys if OURS.match(key[0])}
    assert len(names) >= 7, names
    assert not new


def test_no_view_of_a_profiling_cache_is_kept(model, tmp_path):
    bita = adapter_with(model, tmp_path / "adapter", sets_of_one([WIDTH]))
    with engine(model, bita, **OPTIONS) as llm:
        runner = runner_of(llm)
        assert len(runner.layer_caches) == 1
        config = runner.kv_cache_config
        runner.initialize_kv_cache(config, is_profiling=True)
        assert runner.layer_caches == []
        runner.initialize_kv_cache(config)
        assert len(runner.layer_caches) == 1
        runner.shutdown()
        assert runner.layer_caches == []

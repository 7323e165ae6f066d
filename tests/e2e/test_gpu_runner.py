"""vLLM's V2 runner with our Triton kernels, interpreted on the CPU: the same tokens as plain V2.

Runs with `pytest --runner gpu`. What a request may ask for is in test_request_features.py, widths by load in
test_ladder.py. Here: a few requests that are prefilled in chunks, run out of KV blocks and are preempted, with
low-rank deltas, with logits in parts, and without a wait for the device.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from e2e.device_reads import OURS, device_reads
from e2e.engines import generate, make_adapter, metric, run
from e2e.inspection import compare_with_trainer, known, oracle, recorded_groups, recorded_steps
from naive_flash import put_in_flash_attention
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from bita_vllm import config as bita_config
from bita_vllm.runner.loading import attention_backend
from bita_vllm.step.settings import get_settings
from bita_vllm.system import platform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ON_GPU_RUNNER, reason="runs with --runner gpu"),
]
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 112,  # the blocks of all requests
    "block_size": 32,
    "num_gpu_blocks_override": 8,
}
# prompt tokens, and what is asked for: a way through the sampler each
REQUESTS = {
    "greedy": (5, {"temperature": 0}),
    "filters": (
        70,
        {"temperature": 1.1, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "seed": 17},
    ),
    "penalties": (20, {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.3}),
    "seeded": (33, {"temperature": 0.8, "seed": 3}),
    "logprobs": (50, {"temperature": 0.7, "seed": 11, "logprobs": 3}),
    "bias": (9, {"temperature": 0, "min_tokens": 6, "logit_bias": {7: 2.0}}),
}


def requests(number=None, max_tokens=12):
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(3, 500, length).tolist(),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options),
        )
        for length, options in REQUESTS.values()
    ][:number]


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    model = tiny_model("llama", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path_factory.mktemp("adapter"))
    return model, adapter, run(model, requests(), **OPTIONS)


def counters(llm) -> list[int]:
    """Depths drafted, depths accepted, preemptions."""
    names = "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions"
    return [metric(llm, name) for name in names]


def check_sleep_keeps_the_tables(runner) -> None:
    """vLLM's level 2 keeps buffers of the model only."""
    kept = {buffer.data_ptr() for buffer in runner.model.buffers()}
    trees = runner.model_state.trees
    tensors = [
        t
        for o in (trees, trees.table, trees.choice)
        for t in vars(o).values()
        if torch.is_tensor(t)
    ]
    assert len(tensors) > 20 and {t.data_ptr() for t in tensors} <= kept
    for context in runner.compilation_config.static_forward_context.values():
        assert {context.impl.prompt_keys.data_ptr(), context.impl.prompt_values.data_ptr()} <= kept


def check_profile_run(runner, num_requests) -> None:
    """It samples as many rows as a step may hold: six nodes each."""
    sampled = []
    with pytest.MonkeyPatch.context() as patch:
        sample = type(runner.sampler).sample

        def sampling(self, logits, *args, **kwargs):
            sampled.append(logits.shape)
            return sample(self, logits, *args, **kwargs)

        patch.setattr(type(runner.sampler), "sample", sampling)
        hidden_size = runner.model_config.get_hidden_size()
        runner._dummy_sampler_run(torch.zeros(4, hidden_size))
    assert sampled[-1] == (num_requests * 6, runner.vocab_size)


def test_a_read_of_the_device_is_seen():
    code = "def leak(x):\n    if x.any():\n        return x.nonzero()\n    return x.sum().item()"
    names = {}
    exec(compile(code, f"{OURS[0]}/leak.py", "exec"), names)
    with device_reads() as reads:
        names["leak"](torch.tensor([True]))
        torch.tensor([1]).item()  # a test's own
    assert [read.partition(": ")[2] for read in reads] == ["Tensor.__bool__", "Tensor.nonzero"]


def runner_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def adapter_with_deltas(case, tmp_path_factory):
    return make_adapter(case[0], tmp_path_factory.mktemp("deltas"), lora_rank=4)


@pytest.mark.parametrize("drafts", ["random adapter", "oracle"])
def test_tokens_and_logprobs_equal_plain_v2(case, adapter_with_deltas, monkeypatch, drafts):
    """The oracle goes with low-rank deltas as large as the weights: ordinary rows must not see them.

    The other run holds the logits of two requests at a time.
    """
    model, adapter, plain = case
    if drafts == "oracle":
        adapter = adapter_with_deltas
    else:
        limit = "bita_vllm.runner.gpu_logits.get_max_chunk_logits"
        monkeypatch.setattr(limit, lambda vocab_size: 13)
    source = oracle(known(plain)) if drafts == "oracle" else nullcontext()
    bita = {"model": str(adapter), "tree": "3,2"}
    with recorded_steps() as steps, source, engine(model, bita, **OPTIONS) as llm:
        before = counters(llm)
        with nullcontext([]) if drafts == "oracle" else device_reads() as reads:
            outputs = generate(llm, requests())
        assert not reads, "the host waits for the device"
        drafted, accepted, preempted = (b - a for a, b in zip(before, counters(llm), strict=True))
        check_sleep_keeps_the_tables(runner_of(llm))
        check_profile_run(runner_of(llm), num_requests=4 if drafts == "oracle" else 2)
        free = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert free.get_num_free_blocks() == OPTIONS["num_gpu_blocks_override"] - 1

    for kind, expected, output in zip(REQUESTS, plain, outputs, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids, kind
    index = list(REQUESTS).index("logprobs")
    for ours, theirs in zip(
        outputs[index].outputs[0].logprobs, plain[index].outputs[0].logprobs, strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert all(abs(ours[t].logprob - theirs[t].logprob) < 1e-4 for t in ours)
    lengths = [len(step.tokens) for step in steps if step.line > 0]
    print(f"{len(steps)} steps, {preempted} preemptions, lengths {sorted(lengths)}")
    assert len(lengths) > 20
    assert preempted > 0
    # Padded blocks without candidates offer no depth; cut ones offer less than their line.
    assert 0 < drafted <= sum(max(step.line, 0) for step in steps)  # one template: line D offers D
    assert accepted == sum(len(step.tokens) - 1 for step in steps)
    if drafts == "oracle":
        assert max(lengths) == 3
        assert any(step.path != list(range(len(step.path))) for step in steps), "no row moved"


def test_tokens_equal_plain_v2_with_prefill_in_flash_attention(tiny_model, tmp_path, monkeypatch):
    """vLLM's FlashAttention backend with naive arithmetic for its kernel; softcaps, a window in one layer.

    One request at a time, so that no chunk of a prefill shares its step with a block.
    """
    model = tiny_model("gemma2", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    options = {
        **OPTIONS,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 1,
        "num_gpu_blocks_override": 16,
    }
    plain = run(model, requests(3, max_tokens=6), **options)
    naive = put_in_flash_attention(monkeypatch)
    bita = {"model": str(adapter), "tree": "3,2"}
    with recorded_steps() as steps, engine(model, bita, **options) as llm:
        layers = list(runner_of(llm).compilation_config.static_forward_context.values())
        assert all(layer.impl.flash is not None for layer in layers)
        naive.calls.clear()
        outputs = generate(llm, requests(3, max_tokens=6))
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    # Both layers of every step with prefill (the second prompt takes two), and of no other.
    chunks = [(call["max_seqlen_q"], call["max_seqlen_k"]) for call in naive.calls]
    assert chunks == [(n, k) for n, k in ((5, 5), (48, 48), (22, 70), (20, 20)) for _ in layers]
    assert sum(step.line >= 0 for step in steps) > 5


@pytest.mark.parametrize("fp8_queries", [False, True])
def test_tokens_equal_plain_v2_with_an_fp8_cache(
    case, adapter_with_deltas, monkeypatch, fp8_queries
):
    """Plain V2 in vLLM's Triton backend: its CPU kernels take fp8 on AVX-512 only. Scales are not 1.

    On CUDA vLLM quantises queries, too, and its kernel then rounds the weights of the values to fp8, which
    tree attention does not: here neither does.
    """
    model = case[0]
    init, unified_attention = TritonAttentionImpl.__init__, triton_attn.unified_attention

    def as_on_cuda(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.supports_quant_query_input = fp8_queries

    def with_exact_weights(**given):
        given["seq_threshold_3D"] = None  # one pass over the context is quicker in the interpreter
        quantised.append(given["q"].dtype == torch.float8_e4m3fn)
        if quantised[-1]:
            given["q"] = given["q"].to(given["out"].dtype) * given["q_descale"]
            given["q_descale"] = None
        return unified_attention(**given)

    def with_scales(llm):
        for layer in runner_of(llm).compilation_config.static_forward_context.values():
            assert layer.kv_cache.dtype == torch.uint8
            for name, scale in {"_q_scale": 0.03, "_k_scale": 0.07, "_v_scale": 0.013}.items():
                getattr(layer, name).fill_(scale)
        return llm

    quantised = []
    monkeypatch.setattr(TritonAttentionImpl, "__init__", as_on_cuda)
    monkeypatch.setattr(triton_attn, "unified_attention", with_exact_weights)
    options = {**OPTIONS, "kv_cache_dtype": "fp8"}
    triton = attention_backend(AttentionBackendEnum.CPU_ATTN, TritonAttentionBackend)
    with triton, engine(model, **options) as llm:
        plain = generate(with_scales(llm), requests(5, max_tokens=8))
    bita = {"model": str(adapter_with_deltas), "tree": "3,2"}
    with recorded_steps() as steps, oracle(known(plain)), engine(model, bita, **options) as llm:
        outputs = generate(with_scales(llm), requests(5, max_tokens=8))
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert set(quantised) == {fp8_queries}
    assert any(step.path != list(range(len(step.path))) for step in steps), "no row moved"


def test_mask_logits_with_deltas_equal_the_trainers(case, adapter_with_deltas):
    """Chunked prefill next to blocks."""
    model = case[0]
    rng = np.random.default_rng(5)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [(rng.integers(3, 500, length).tolist(), params) for length in (3, 60)]
    bita = {"model": str(adapter_with_deltas), "tree": "2,1"}
    with recorded_groups(3) as recorded, engine(model, bita, **OPTIONS) as llm:
        outputs = generate(llm, prompts)
    compared, worst = compare_with_trainer(model, adapter_with_deltas, outputs, recorded)
    print(f"{compared} groups, largest difference {worst:.1e}")
    assert compared >= 6
    assert worst < 1e-3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_gpu_takes_the_v2_runner_and_may_schedule_ahead(case, monkeypatch, asynchronous):
    model, adapter, _ = case
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    speculative = {"method": "bita", "model": str(adapter), "tree": "3,2"}
    config = EngineArgs(
        str(model),
        max_model_len=128,
        speculative_config=speculative,
        async_scheduling=asynchronous,
    ).create_engine_config()
    assert config.parallel_config.worker_cls == bita_config.GPU_WORKER_CLS
    assert config.use_v2_model_runner
    assert config.attention_config.backend.name == "TRITON_ATTN"
    # vLLM's CPU platform turned it off again, after the check that the method allows it.
    config.scheduler_config.async_scheduling = asynchronous
    bita_config.check_engine(config, get_settings(config))
    scheduler = config.scheduler_config.get_scheduler_cls().__name__
    assert scheduler == ("BitaAsyncScheduler" if asynchronous else "BitaScheduler")
    assert not config.speculative_config.use_ngram()
    assert not config.speculative_config.use_ngram_gpu()

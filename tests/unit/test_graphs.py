"""Every decode batch has a FULL graph of its own width, by vLLM's own manager, without a GPU."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tree_tools import sets_of_one
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import cudagraph_utils

from bita_vllm.runner.gpu_graphs import WidthGraphManager
from bita_vllm.scheduling.online import WidthPolicy
from bita_vllm.step import graphs
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.step_cost import MeasuredCost
from bita_vllm.tuning.profile import graph_sizes, profile_ladder

# batch sizes -> R-1, as vLLM takes them: rows of a step pass 512, and width 0 is plain decoding
LADDER = [(1, 4, 27), (5, 16, 15), (17, 90, 7), (91, 120, 0)]
MAX_NUM_SEQS = 120


@pytest.fixture
def make_config(tiny_model, adapter):
    def make(schedule, **options):
        config = EngineArgs(
            str(tiny_model("llama")),
            max_model_len=512,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=4096,
            speculative_config={"method": "bita", "model": str(adapter), "tree": "3,3"},
            **options,
        ).create_engine_config()
        assert config.speculative_config.num_speculative_tokens == 27
        config.speculative_config.num_speculative_tokens_per_batch_size = schedule
        # as on a GPU: vLLM's CPU platform turned graphs off
        compilation = config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes = compilation.max_cudagraph_capture_size = None
        config._set_cudagraph_sizes()
        return config

    return make


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    from e2e.engines import make_adapter

    return make_adapter(tiny_model("llama"), tmp_path_factory.mktemp("adapter"))


def captured(config, monkeypatch, manager_class=WidthGraphManager):
    """A manager as it is after capture."""
    only = type("Group", (), {"is_first_rank": True, "is_last_rank": True})
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", only)
    monkeypatch.setattr(
        cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False
    )
    manager = manager_class(
        config,
        "cpu",
        config.compilation_config.cudagraph_mode,
        decode_query_len=config.num_speculative_tokens + 1,
    )
    manager._graphs_captured = True
    return manager


@pytest.mark.parametrize("schedule", [LADDER, None], ids=["ladder", "one width"])
def test_every_decode_batch_has_a_full_graph_of_its_width(make_config, monkeypatch, schedule):
    config = make_config(schedule)
    stock = list(config.compilation_config.cudagraph_capture_sizes)
    graphs.cover_widths(config)
    assert config.compilation_config.cudagraph_capture_sizes == stock, "plain steps' and piecewise"
    manager = captured(config, monkeypatch)
    full = manager._capture_descs[CUDAGraphMode.FULL]
    table = schedule or [(1, MAX_NUM_SEQS, 27)]
    assert {desc.uniform_token_count - 1 for desc in full} == {width for *_, width in table}
    assert len(set(full)) == len(full)
    assert [desc.num_tokens for desc in full] == sorted((d.num_tokens for d in full), reverse=True)
    print(f"{len(full)} FULL graphs, {len(stock)} piecewise ones")
    for _, most, width in table:
        rows = width + 1
        # Also fewer requests than the width is for: what a batch is that has just shrunk.
        for n in range(1, most + 1):
            desc = manager.dispatch(n, n * rows, rows, 0, max_query_len=rows)
            assert desc.cg_mode == CUDAGraphMode.FULL, (n, width)
            assert desc.uniform_token_count == rows and n <= desc.num_reqs < n + 16
            assert desc in full
    for num_tokens in range(2, stock[-1]):  # with a prefill chunk
        mixed = manager.dispatch(2, num_tokens, None, 0)
        assert mixed.cg_mode == CUDAGraphMode.PIECEWISE
    bounds = graphs.most_requests(config)
    for width, most in bounds.items():
        largest = max(d.num_reqs for d in full if d.uniform_token_count == width + 1)
        assert largest == most, "graphs that no batch uses, or batches without"


def test_plain_steps_do_not_bound_the_rows_of_blocks(make_config):
    """1024 requests that decode plainly are more rows than any step with blocks has."""
    config = make_config([(1, 4, 27), (5, 8, 15), (9, MAX_NUM_SEQS, 0)])
    config.scheduler_config.max_num_seqs = 1024
    assert graphs.most_requests(config) == {27: 4, 15: 8, 0: 1024}
    config.speculative_config.num_speculative_tokens_per_batch_size = [(1, MAX_NUM_SEQS, 0)]
    assert graphs.most_requests(config) == {0: 1024}


def test_plain_steps_have_plain_vllms_graphs(make_config, monkeypatch):
    """Of no more rows than there; batches after vLLM's largest graph have none, as there."""
    config = make_config(LADDER)
    graphs.cover_widths(config)
    ours = captured(config, monkeypatch)
    plain_config = copy.copy(config)
    plain_config.speculative_config = None
    plain_config.compilation_config = compilation = copy.copy(config.compilation_config)
    compilation.cudagraph_capture_sizes = compilation.max_cudagraph_capture_size = None
    plain_config._set_cudagraph_sizes()
    plain = captured(plain_config, monkeypatch, cudagraph_utils.ModelCudaGraphManager)
    for n in range(1, MAX_NUM_SEQS + 1):
        own, theirs = (m.dispatch(n, n, 1, 0, max_query_len=1) for m in (ours, plain))
        assert own.cg_mode == theirs.cg_mode == CUDAGraphMode.FULL
        assert own.uniform_token_count == 1 and own.num_tokens == own.num_reqs <= theirs.num_reqs


def test_policy_gives_no_width_without_a_graph(make_config, monkeypatch):
    """It would give the largest block to every batch, as rows cost nothing."""
    config = make_config(LADDER)
    graphs.cover_widths(config)
    manager = captured(config, monkeypatch)
    templates = [Template.from_widths(widths, 3) for widths in ([1], [3], [3, 3])]
    ladder = Ladder(sets_of_one(templates), LADDER)
    acceptance = np.zeros((3, 2, 3, 3))
    acceptance[..., 0] = 0.9
    bounds = graphs.most_requests(config)
    chosen = {}
    for most_requests in (None, bounds):
        policy = WidthPolicy(
            ladder,
            acceptance,
            MeasuredCost([(1, 1.0, 0.01), (1, 28.0, 0.01)]),
            MAX_NUM_SEQS,
            padded=True,
            most_requests=most_requests,
        )
        policy.review(now=policy._reviewed + 60)
        chosen[most_requests is None] = policy.lookup
    assert chosen[True][MAX_NUM_SEQS] == 27, "the policy has a bound of its own"
    for n, width in enumerate(chosen[False][1:], start=1):
        assert n <= bounds[width]
        desc = manager.dispatch(n, n * (width + 1), width + 1, 0, max_query_len=width + 1)
        assert desc.cg_mode == CUDAGraphMode.FULL, (n, width)
    assert chosen[False] != ladder.lookup(MAX_NUM_SEQS).tolist(), "nothing changed"


def test_piecewise_graphs_come_with_deltas_and_without(make_config, monkeypatch):
    config = make_config(LADDER)
    bita = config.speculative_config.bita
    config.speculative_config.bita = replace(bita, mask_lora=(4, ("o_proj",)))
    graphs.cover_widths(config)
    sizes = config.compilation_config.cudagraph_capture_sizes
    manager = captured(config, monkeypatch)
    piecewise = manager._capture_descs[CUDAGraphMode.PIECEWISE]
    assert [desc.num_tokens for desc in piecewise] == [n for n in sizes[::-1] for _ in range(2)]
    assert len(set(piecewise)) == 2 * len(sizes)
    found = {}
    for manager.step_has_blocks in (False, True):
        found[manager.step_has_blocks] = manager.dispatch(3, 100, None, 0)
        assert manager.dispatch(3, 24, 8, 0, max_query_len=8).cg_mode == CUDAGraphMode.FULL
    assert found[False] != found[True] and set(found.values()) <= set(piecewise)
    assert found[False].num_active_loras == 0, "vLLM's own key"

    state, seen = SimpleNamespace(captures_deltas=False), {}

    def capture(self, model, model_state, *args, lora_capture_hook):
        for desc in piecewise:
            lora_capture_hook(desc.num_active_loras, desc.num_reqs, desc.num_tokens)
            seen[desc] = model_state.captures_deltas

    monkeypatch.setattr(cudagraph_utils.ModelCudaGraphManager, "capture", capture)
    manager.capture(None, state, lora_capture_hook=None)
    assert not seen[found[False]] and seen[found[True]] and not state.captures_deltas


def test_a_profile_times_every_point_in_a_graph_of_its_own(make_config, monkeypatch):
    templates = [Template.from_widths(widths, 3) for widths in ([1], [2], [3, 3])]
    ladder = profile_ladder(sets_of_one(templates), max_requests=64)
    requests = [1, 4, 16, 64]
    config = make_config(list(ladder.batch_sizes))
    sizes = graph_sizes(requests, ladder.widths)
    config.compilation_config.cudagraph_capture_sizes = sizes
    config.compilation_config.max_cudagraph_capture_size = sizes[-1]
    manager = captured(config, monkeypatch)
    for n in requests:
        for rows in [1, *(template.num_rows for template in templates)]:
            desc = manager.dispatch(n, n * rows, rows, 0, max_query_len=rows)
            assert desc.cg_mode == CUDAGraphMode.FULL, (n, rows)
            assert (desc.num_reqs, desc.uniform_token_count) == (n, rows)


def test_vllms_own_sizes_stop_earlier(make_config, monkeypatch):
    """Else this module could go."""
    manager = captured(make_config(None), monkeypatch, cudagraph_utils.ModelCudaGraphManager)
    assert manager.dispatch(100, 2800, 28, 0, max_query_len=28).cg_mode == CUDAGraphMode.NONE


def test_sizes_that_the_user_chose_stay(make_config):
    assert graphs.user_chose_sizes(EngineArgs("m", cudagraph_capture_sizes=[1, 2]))
    assert graphs.user_chose_sizes(
        EngineArgs("m", compilation_config={"max_cudagraph_capture_size": 64})
    )
    assert not graphs.user_chose_sizes(EngineArgs("m"))


def test_nothing_is_added_without_graphs(make_config):
    config = make_config(None)
    config.compilation_config.cudagraph_capture_sizes = []
    graphs.cover_widths(config)
    assert config.compilation_config.cudagraph_capture_sizes == []
    assert config.speculative_config.graph_batches is None

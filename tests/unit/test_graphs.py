"""Every decode batch has a FULL graph of its own width, by vLLM's own manager, without a GPU."""

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import cudagraph_utils

from bita_vllm import graphs

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


def captured(config, monkeypatch):
    """vLLM's manager as it is after capture."""
    only = type("Group", (), {"is_first_rank": True, "is_last_rank": True})
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", only)
    monkeypatch.setattr(
        cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False
    )
    manager = cudagraph_utils.CudaGraphManager(
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
    before = set(config.compilation_config.cudagraph_capture_sizes)
    graphs.cover_widths(config)
    added = set(config.compilation_config.cudagraph_capture_sizes) - before
    manager = captured(config, monkeypatch)
    full = manager._capture_descs[CUDAGraphMode.FULL]
    widths = {desc.uniform_token_count - 1 for desc in full}
    assert widths == ({27, 15, 7, 0} if schedule else {27})
    print(f"{len(full)} FULL graphs, {len(added)} sizes added to {len(before)}")

    def width_of(n):
        return next(w for first, last, w in schedule or [(1, 120, 27)] if first <= n <= last)

    for n in range(1, MAX_NUM_SEQS + 1):
        rows = width_of(n) + 1
        desc = manager.dispatch(n, n * rows, rows, 0, max_query_len=rows)
        assert desc.cg_mode == CUDAGraphMode.FULL, n
        assert desc.uniform_token_count == rows and desc.num_reqs >= n
        assert desc.num_reqs < n + 16


def test_vllms_own_sizes_stop_earlier(make_config, monkeypatch):
    """Else this module could go."""
    manager = captured(make_config(None), monkeypatch)
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

"""Rows by load where nothing was measured: below the knee of the machine, plain beyond it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.utils.import_utils import import_pynvml
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.adapter.model_size import ModelSize
from bita_vllm.scheduling.default_rows import GPU_BUDGETS, UNKNOWN_GPU, Machine, default_ladder
from bita_vllm.scheduling.online import policy_of
from bita_vllm.system.machine import DeviceSpeed, gpu_speed
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.step_cost import Roofline

ADAPTERS = Path(__file__).parents[2] / "adapters"
NAMES = ("smollm2-135m-instruct", "smollm2-135m-instruct-no-deltas")
LLAMA_8B = ModelSize(32, 4096, 14336, 32, 8, 128, 128256)
MODELS = {"8B": LLAMA_8B, "135M": None}  # None: the adapter's own
SPEEDS = {
    "H100": DeviceSpeed(3.0e12, 640e12),
    "H200": DeviceSpeed(4.4e12, 640e12),
    "A100": DeviceSpeed(1.84e12, 187e12),
    "L4": DeviceSpeed(0.27e12, 36e12),
    "B200": DeviceSpeed(7.4e12, 1400e12),
    "unknown": None,
}
MOST = 512


@pytest.fixture(scope="module", params=NAMES)
def adapter(request):
    return AdapterConfig.load(ADAPTERS / request.param)


def on_gpu(speed, **facts):
    return Machine(on_gpu=True, speed=speed, **{"has_deltas": False, **facts})


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
def test_rows_fall_with_the_load_and_stay_below_the_knee(adapter, speed, model):
    ladder = default_ladder(adapter, on_gpu(speed), model)
    rows = ladder.lookup(MOST)[1:] + 1
    assert rows[0] > 1, "one request has a block"
    assert (np.diff(rows) <= 0).all()
    blocks = rows > 1
    requests = np.arange(1, MOST + 1)
    knee = (speed or UNKNOWN_GPU).knee
    assert (rows * requests)[blocks].max() <= knee
    assert not blocks[requests * 3 > knee].any(), "plain beyond"
    assert len(ladder.template_sets) <= len(GPU_BUDGETS)


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
def test_the_ladder_is_one_that_vllm_and_the_adapter_take(adapter, speed):
    ladder = default_ladder(adapter, on_gpu(speed), LLAMA_8B)
    ladder.check(adapter.num_mask_tokens)
    widest = ladder.widest.width
    expected = build_dynamic_sd_schedule_lookup(list(ladder.batch_sizes), MOST, widest)
    assert ladder.lookup(MOST).tolist() == expected
    assert set(ladder.widths) == {width for *_, width in ladder.batch_sizes} - {0}


def test_a_gpu_that_is_not_known_gets_no_more_rows_than_one_that_is(adapter):
    unknown = default_ladder(adapter, on_gpu(None), LLAMA_8B).lookup(MOST)
    for speed in filter(None, SPEEDS.values()):
        assert (unknown <= default_ladder(adapter, on_gpu(speed), LLAMA_8B).lookup(MOST)).all()


@pytest.mark.parametrize("facts", [{"param_bytes": 0.5}, {"param_bytes": 4}], ids=str)
def test_weights_of_fewer_bytes_or_without_tensor_cores_leave_fewer_rows(adapter, facts):
    speed = SPEEDS["H100"]
    bf16 = default_ladder(adapter, on_gpu(speed), LLAMA_8B).lookup(MOST)
    other = default_ladder(adapter, on_gpu(speed, **facts), LLAMA_8B).lookup(MOST)
    assert (other <= bf16).all() and other.sum() < bf16.sum() / 2


def test_more_rows_read_more_experts():
    dense = replace(LLAMA_8B, num_experts=1)
    experts = replace(LLAMA_8B, intermediate_size=1792, num_experts=64, experts_per_row=8)
    assert experts.layer_params == dense.layer_params
    cost = Roofline.of(experts, SPEEDS["H100"])
    one, many = cost.seconds(1, 1, 0), cost.seconds(1, 64, 0) - cost.block_overhead
    assert one == pytest.approx(Roofline.of(dense, SPEEDS["H100"]).seconds(1, 1, 0))
    assert many > 3 * one


def test_blocks_fit_in_a_sequence(adapter):
    ladder = default_ladder(adapter, on_gpu(SPEEDS["H100"], max_block=20), LLAMA_8B)
    assert ladder.widest.num_rows == 16
    assert default_ladder(adapter, on_gpu(SPEEDS["H100"], max_block=2), LLAMA_8B) is None


def test_on_a_cpu_one_request_has_a_block_where_rows_are_cheap(adapter):
    packed = default_ladder(adapter, Machine(on_gpu=False, packs_linear_layers=True))
    assert 3 <= packed.lookup(64)[1] + 1 <= 8
    assert not packed.lookup(64)[2:].any()
    stock = default_ladder(adapter, Machine(on_gpu=False))
    assert not stock.lookup(64).any()
    assert stock.describe() == "1-up: plain"


def test_what_is_seen_corrects_the_table_but_never_beyond_the_knee():
    folder = ADAPTERS / NAMES[0]
    config = AdapterConfig.load(folder)
    ladder = default_ladder(config, on_gpu(SPEEDS["H100"]), LLAMA_8B)
    acceptance = acceptance_table(config.acceptance, config.num_mask_tokens)
    policy = policy_of(ladder, acceptance, MOST, padded=True)
    assert policy.lookup == ladder.lookup(MOST).tolist()
    now = policy._reviewed
    for _ in range(200):  # blocks that cost nothing on top
        policy.saw_step(["a"] * 8, [-1] * 8, [0] * 8, 0.1)
    policy.review(now + 20)
    knee = SPEEDS["H100"].knee
    assert all(width == 0 or n * (width + 1) <= knee for n, width in enumerate(policy.lookup))
    assert len(set(policy.lookup)) > 3


def nvml(capability, cores, clock, memory_clock, bus):
    """NVML as an H100's driver answers; raises where a driver would."""

    class NVMLError(Exception):
        pass

    def known(value):
        def answer(*args):
            if value is None:
                raise NVMLError
            return value

        return answer

    clocks = {1: clock, 2: memory_clock}
    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=known(0),
        nvmlShutdown=known(0),
        nvmlDeviceGetHandleByIndex=known("gpu"),
        nvmlDeviceGetMaxClockInfo=lambda gpu, kind: clocks[kind],
        nvmlDeviceGetMemoryBusWidth=known(bus),
        nvmlDeviceGetNumGpuCores=known(cores),
        nvmlDeviceGetCudaComputeCapability=known(capability),
    )


@pytest.mark.parametrize(
    ("answers", "bytes_per_second", "flops_per_second"),
    [
        (((9, 0), 16896, 1980, 2619, 5120), 3.0e12, 640e12),
        (((8, 0), 6912, 1410, 1593, 5120), 1.84e12, 187e12),
        (((8, 9), 16384, 2520, 10501, 384), 0.91e12, 99e12),
    ],
    ids=["H100 SXM", "A100 SXM 80GB", "RTX 4090"],
)
def test_a_gpus_speed_follows_from_clocks_bus_and_cores(
    answers, bytes_per_second, flops_per_second
):
    speed = gpu_speed(nvml(*answers), 0)
    assert speed.bytes_per_second == pytest.approx(bytes_per_second, rel=0.02)
    assert speed.flops_per_second == pytest.approx(flops_per_second, rel=0.02)


@pytest.mark.parametrize(
    "answers",
    [((7, 5), 2560, 1590, 5001, 256), ((9, 0), None, 1980, 2619, 5120), ((9, 0), 1, 1980, 0, 0)],
    ids=["no bf16", "old driver", "no memory of its own"],
)
def test_a_gpu_that_nvml_does_not_describe_is_not_known(answers):
    assert gpu_speed(nvml(*answers), 0) is None


def test_without_a_driver_the_gpu_is_not_known():
    assert gpu_speed(import_pynvml(), 0) is None

"""Rows by load where nobody has measured any: a ladder from what is known of the machine.

The ladder of an adapter that `bita tune` was not run for. It is chosen as `bita tune` chooses
(`tree/ladder_search.py`), by a predicted cost: on a GPU the roofline of its memory and its tensor cores, on a CPU a
price for every row. A step's rows stay below the knee, where matrix products begin to cost; beyond it decoding is
plain. What is seen while serving corrects the table (`online.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.adapter.model_size import ModelSize
from bita_vllm.system import platform
from bita_vllm.system.machine import DeviceSpeed, is_plain_avx2, num_cores
from bita_vllm.tree.ladder import Ladder, ranges_of
from bita_vllm.tree.ladder_search import choose_ladder
from bita_vllm.tree.search import MIN_ROWS, acceptance_table
from bita_vllm.tree.step_cost import Roofline, RowCost, StepCost
from bita_vllm.tree.template_set import saved_sets

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

logger = init_logger("vllm.bita")

# Row budgets to choose from. Every one that a GPU uses is captured in CUDA graphs of its own, so these are few; each
# has about half the rows of the next one, as it serves twice the requests. On a CPU only one request has blocks.
GPU_BUDGETS = (3, 6, 10, 16, 32)
CPU_BUDGETS = (3, 4, 5, 6, 8)
# A GPU that NVML does not describe: it reads fast, so that all overheads count, and multiplies slowly, so that
# rows count. No GPU with bf16 tensor cores that we know of has its knee at fewer rows.
UNKNOWN_GPU = DeviceSpeed(3e12, 48 * 3e12)
FP32_SHARE = 1 / 16  # of the bf16 products' speed that products without tensor cores have
# Seconds of a further row over those of a step of one row, measured with `bita tune` on two CPUs with AVX2
# (docs/tuning.md): 0.09 with packed linear layers, 0.2 with vLLM's own.
PACKED_ROW, STOCK_ROW = 0.1, 0.2
# The prediction knows nothing of tiles and waves: below this, benchmarks/performance_model.py finds blocks that lose.
GPU_MIN_GAIN = 0.2
CPU_MIN_GAIN = 0.1  # as two CPUs speak for all of them
CPU_BYTES_PER_SECOND = 8e9  # that a core reads; plain steps that are seen correct it
QUANTISED_BYTES = 0.5  # of a weight: fewer bytes give a step fewer rows, so the format with fewest is taken for all
CONTEXT = 2048.0  # tokens of a request that the cost is predicted for: blocks are not to lose at 8000 either
POINT_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Machine:
    """What is known of a run's machine before it has run a step.

    Attributes:
        on_gpu: whether steps run on a GPU.
        speed: of the GPU; None on a CPU, or if it is not known.
        packs_linear_layers: whether the CPU runner packs weights for few rows.
        num_cores: of the CPU.
        param_bytes: of a weight in memory.
        num_devices: that share the model.
        max_block: rows that a block may have at most.
        has_deltas: whether mask rows have low-rank deltas.
    """

    on_gpu: bool
    speed: DeviceSpeed | None = None
    packs_linear_layers: bool = False
    num_cores: int = 1
    param_bytes: float = 2.0
    num_devices: int = 1
    max_block: int = 1 << 30
    has_deltas: bool = True

    @classmethod
    def here(cls, on_gpu: bool) -> Machine:
        """This machine, for an unquantised model in the dtype that is fastest on it."""
        packs = not on_gpu and is_plain_avx2()
        return cls(
            on_gpu=on_gpu,
            speed=platform.speed_of_first_gpu() if on_gpu else None,
            packs_linear_layers=packs,
            num_cores=num_cores(),
            param_bytes=4 if packs else 2,
        )

    def serving(self, model: ModelConfig, parallel: ParallelConfig, has_deltas: bool) -> Machine:
        """The same machine for a run of that model."""
        param_bytes = QUANTISED_BYTES if model.quantization else model.dtype.itemsize
        return replace(
            self,
            packs_linear_layers=self.packs_linear_layers and param_bytes == 4,
            param_bytes=param_bytes,
            num_devices=parallel.tensor_parallel_size,
            max_block=model.max_model_len - 1,
            has_deltas=has_deltas,
        )


def default_ladder(
    adapter: AdapterConfig, machine: Machine, model: ModelSize | None = None
) -> Ladder | None:
    """The ladder that is predicted to be fastest; None if no block fits in a sequence.

    `model`: the adapter's own base model if not given. Raises TemplateError for malformed acceptance statistics.
    """
    if model is None:
        model = ModelSize.from_hf_config(adapter.raw["transformer_layer_config"])
    cost, most_rows = _gpu_cost(model, machine) if machine.on_gpu else _cpu_cost(model, machine)
    budgets = [
        b for b in (GPU_BUDGETS if machine.on_gpu else CPU_BUDGETS) if b <= machine.max_block
    ]
    if not budgets:
        return None
    provenance: dict[str, Any] = {
        "source": "prediction",
        "most_rows": most_rows,
        "step_seconds": _points(cost, budgets),
    }
    most_requests = most_rows // MIN_ROWS + 1  # has no room for the smallest block: plain
    chosen, _ = choose_ladder(
        acceptance_table(adapter.acceptance, adapter.num_mask_tokens),
        cost,
        most_requests,
        context=CONTEXT,
        padded=machine.on_gpu,
        budgets=budgets,
        sets=saved_sets(adapter.acceptance),
        min_gain=GPU_MIN_GAIN if machine.on_gpu else CPU_MIN_GAIN,
        most_rows=most_rows,
    )
    # Where the prediction turns on a hair more requests do not get more rows again.
    widths = np.minimum.accumulate(chosen.lookup(most_requests)[1:]).tolist()
    used = [one for one in chosen.template_sets if one.first.width in widths]
    ladder = Ladder(used or chosen.template_sets, ranges_of(widths), provenance)
    logger.info(
        "bita: no ladder for this machine; rows by load from %s: %s. 'bita tune' measures it.",
        _source(machine),
        ladder.describe(),
    )
    return ladder


def _gpu_cost(model: ModelSize, machine: Machine) -> tuple[StepCost, int]:
    """Cost of a step, and the rows at the knee."""
    speed = machine.speed or UNKNOWN_GPU
    if machine.param_bytes > 2:
        speed = DeviceSpeed(speed.bytes_per_second, FP32_SHARE * speed.flops_per_second)
    cost = Roofline.of(
        model,
        speed,
        param_bytes=machine.param_bytes,
        has_deltas=machine.has_deltas,
        num_devices=machine.num_devices,
    )
    return cost, int(speed.knee * machine.param_bytes / 2)


def _cpu_cost(model: ModelSize, machine: Machine) -> tuple[StepCost, int]:
    """Cost of a step, and the rows of the largest block: there is no knee, one request alone has blocks."""
    params = model.layer_params + model.head_params
    first = machine.param_bytes * params / (CPU_BYTES_PER_SECOND * machine.num_cores)
    return RowCost(first, row_share(machine) * first), max(CPU_BUDGETS)


def row_share(machine: Machine) -> float:
    """What a further row takes on a CPU, of a step of one row."""
    return PACKED_ROW if machine.packs_linear_layers else STOCK_ROW


def _points(cost: StepCost, budgets: list[int]) -> list[tuple[int, int, float]]:
    """What `bita tune` would have measured: requests, rows a request, seconds."""
    return [
        (n, rows, cost.seconds(n, n * rows, CONTEXT))
        for n in POINT_REQUESTS
        for rows in (1, *budgets)
    ]


def _source(machine: Machine) -> str:
    if not machine.on_gpu:
        return "what rows cost on a CPU like this one"
    if machine.speed is None:
        return "a cautious guess, as its memory bandwidth and arithmetic are not known"
    terabytes = machine.speed.bytes_per_second / 1e12
    teraflops = machine.speed.flops_per_second / 1e12
    return f"its memory bandwidth and arithmetic ({terabytes:.2g} TB/s, {teraflops:.0f} TFLOP/s)"

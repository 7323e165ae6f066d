"""What a step costs: measured on a machine, or from a roofline.

Every cost model answers `seconds(requests, rows, context)`: rows over all requests of the step, mean
context of a request in tokens. Arrays broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bita_vllm.adapter.model_size import ModelSize
from bita_vllm.system.errors import UserError
from bita_vllm.system.machine import DeviceSpeed

# Of a GPU step, in seconds; assumptions that come to 0.7 ms for plain vLLM with an 8B model.
STEP_OVERHEAD = 0.38e-3  # launch of the graph, sampling, what of scheduling nothing hides
LAYER_OVERHEAD = (
    10e-6  # norms, rotary positions, activation function: kernels too small for their work to count
)
BLOCK_OVERHEAD = 0.15e-3  # walk, KV moves, the next block: some twenty small kernels
DELTA_OVERHEAD = 4 * 2 * 2.7e-6  # of a layer: two kernels in each of its four fused linear layers
BLOCK_LAYER_OVERHEAD = 5e-6  # of a layer's tree attention: filling its pipeline, merging its splits
KV_BYTES = 2  # of a value
# Tree attention goes over a request's context once for each tile of so many rows times query heads of a KV head, and
# reads, by head size, what 132 SMs read that wait a microsecond for each tile of 32 keys and values.
TILE_ROWS = 64
BLOCK_READ_PER_HEAD_SIZE = 132 * 32 * 2 * KV_BYTES / 1e-6


class StepCost(Protocol):
    """What a step takes."""

    def seconds(self, requests: int, rows: float, context: float) -> float:
        """rows == requests is plain decoding."""


class CostError(UserError):
    """Cost measurements that cannot be used; the message is one sentence for the user."""


class Point(NamedTuple):
    """Steps that were timed.

    Attributes:
        requests: of the batch.
        rows: mean of a request.
        seconds: of a step.
        spread: half of the interval of the ratio of seconds to a plain step's, relative to the ratio.
    """

    requests: int
    rows: float
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class MeasuredCost:
    """Steps timed in the engine: linear between what was measured, and beyond its ends.

    Attributes:
        points: `Point`s, or what they are made of. Every number of requests needs one row (plain decoding) and at
            least one larger block.
    """

    points: Sequence[tuple]

    def __post_init__(self) -> None:
        """Raises CostError."""
        object.__setattr__(self, "points", sorted(Point(*point) for point in self.points))
        for requests in self.measured_requests:
            rows, seconds, _ = self._curve(requests)
            if len(rows) < 2 or rows[0] != 1:
                raise CostError(
                    f"Step cost at {requests} requests was measured for {rows.tolist()} rows a request; "
                    "expected 1 and at least one larger number."
                )
            if not (np.isfinite(seconds).all() and seconds.min() > 0):
                raise CostError(
                    f"Step cost at {requests} requests is {seconds.tolist()} seconds; expected positive numbers."
                )

    @property
    def measured_requests(self) -> list[int]:
        return sorted({point[0] for point in self.points})

    def seconds(self, requests: int, rows: float, context: float = 0.0) -> float:
        """The context that was measured with is taken for every other: short next to the model's weights."""
        measured = self.measured_requests
        curves = [self._curve(n) for n in measured]
        each = [_line(timed_rows, seconds, rows / requests) for timed_rows, seconds, _ in curves]
        return float(_line(np.array(measured, float), np.array(each), requests))

    def spread(self, requests: int, rows: float) -> float:
        """How far the ratio of a step's seconds to a plain step's may be off, relative to it; interpolated."""
        measured, each = self.measured_requests, []
        for n in measured:
            timed_rows, _, spread = self._curve(n)
            each.append(np.interp(rows / requests, timed_rows[1:], spread[1:]))
        return float(np.interp(requests, measured, each))

    def _curve(self, requests: int) -> tuple[np.ndarray, ...]:
        """`[points]` each: rows a request, seconds, spread; at that many requests, plain decoding first."""
        curve = [point[1:] for point in self.points if point[0] == requests]
        return tuple(np.array(column) for column in zip(*curve, strict=True))


def _line(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Piecewise linear through the points, the outer pieces carried on."""
    if len(x) == 1:
        return float(y[0])
    i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    return float(y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i]))


@dataclass(frozen=True)
class Roofline:
    """A GPU from its two limits: matrix products take the longer of weights and arithmetic, KV comes on top.

    Attributes:
        weight_bytes: read once a step.
        flops_per_row: of all matrix products of one row.
        kv_bytes_per_token: read once a step for each token of every request's context.
        bytes_per_second, flops_per_second: what the machine reaches in a plain copy and a large product.
        overhead: seconds a step takes on top, launches, sampling and scheduling that nothing hides.
        block_overhead: seconds more in a step with blocks: walk, KV moves, candidates.
        expert_bytes: of all experts of the model, of which a step reads those that one of its rows goes through.
        expert_share: of them that one row goes through.
        rows_per_pass: of a request, in attention over its context.
        block_bytes_per_second: that attention reads in steps with blocks.
    """

    weight_bytes: float
    flops_per_row: float
    kv_bytes_per_token: float
    bytes_per_second: float
    flops_per_second: float
    overhead: float
    block_overhead: float
    expert_bytes: float = 0.0
    expert_share: float = 0.0
    rows_per_pass: float = np.inf
    block_bytes_per_second: float = np.inf

    @classmethod
    def of(
        cls,
        model: ModelSize,
        speed: DeviceSpeed,
        *,
        param_bytes: float = 2.0,
        has_deltas: bool = True,
        num_devices: int = 1,
    ) -> Roofline:
        """The roofline of a model on a GPU; block steps cost what they cost at worst, a second LM head included.

        Args:
            model: its dimensions.
            speed: of the GPU.
            param_bytes: of a weight in memory.
            has_deltas: whether mask rows have low-rank deltas.
            num_devices: that share the model (tensor parallelism).
        """
        head_bytes = param_bytes * model.head_params / num_devices
        experts = model.num_experts * model.expert_params if model.num_experts > 1 else 0
        shared = model.attention_params + (0 if experts else model.expert_params)
        of_layer = BLOCK_LAYER_OVERHEAD + (DELTA_OVERHEAD if has_deltas else 0.0)
        return cls(
            weight_bytes=param_bytes * shared / num_devices + head_bytes,
            flops_per_row=2 * (model.layer_params + model.head_params) / num_devices,
            kv_bytes_per_token=KV_BYTES * model.kv_values_per_token / num_devices,
            bytes_per_second=speed.bytes_per_second,
            flops_per_second=speed.flops_per_second,
            overhead=STEP_OVERHEAD + LAYER_OVERHEAD * model.num_layers,
            block_overhead=BLOCK_OVERHEAD
            + of_layer * model.num_layers
            + head_bytes / speed.bytes_per_second,
            expert_bytes=param_bytes * experts / num_devices,
            expert_share=model.experts_per_row / model.num_experts if experts else 0.0,
            rows_per_pass=max(1, TILE_ROWS * model.num_kv_heads // model.num_q_heads),
            block_bytes_per_second=BLOCK_READ_PER_HEAD_SIZE * model.head_size,
        )

    def seconds(self, requests: int, rows: float, context: float) -> float:
        experts = self.expert_bytes * (1 - (1 - self.expert_share) ** rows)
        products = max(
            (self.weight_bytes + experts) / self.bytes_per_second,
            rows * self.flops_per_row / self.flops_per_second,
        )
        kv_bytes = requests * context * self.kv_bytes_per_token
        if rows <= requests:
            return products + kv_bytes / self.bytes_per_second + self.overhead
        passes = max(1.0, np.ceil(rows / requests / self.rows_per_pass))
        kv = passes * kv_bytes / min(self.block_bytes_per_second, self.bytes_per_second)
        return float(products + kv + self.overhead + self.block_overhead)


@dataclass(frozen=True)
class RowCost:
    """A machine where every row costs: a CPU.

    Attributes:
        first: seconds of a step of one row.
        further: seconds of each row more.
    """

    first: float
    further: float

    def seconds(self, requests: int, rows: float, context: float) -> float:
        """Whose rows they are does not matter, nor does the context."""
        return self.first + self.further * (rows - 1)


# What the method allows; what its kernels take on top is predicted by benchmarks/performance_model.py.
# Llama-3.1-8B in bf16: 8.03e9 parameters less the input embedding's 0.53e9 (128256 x 4096), of which a step
# reads single rows; KV: 32 layers, 8 heads of 128, keys and values. An H100 SXM as measured with
# benchmarks/kernel_benchmark.py's copy and a 8192-cubed product: 3.0 TB/s, 800 TFLOP/s. The overheads are
# assumptions: half a millisecond a step, and 0.15 ms for some ten small kernels.
H100_8B = Roofline(
    weight_bytes=2 * 7.5e9,
    flops_per_row=2 * 7.5e9,
    kv_bytes_per_token=2 * 2 * 32 * 8 * 128,
    bytes_per_second=3.0e12,
    flops_per_second=800e12,
    overhead=0.5e-3,
    block_overhead=0.15e-3,
)

"""What a step costs: measured on a machine, or from a roofline.

Every cost model answers `seconds(requests, rows, context)`: rows over all requests of the step, mean
context of a request in tokens. Arrays broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class StepCost(Protocol):
    """Seconds of a step."""

    def seconds(self, requests: int, rows: float, context: float) -> float:
        """rows == requests is plain decoding."""


class CostError(ValueError):
    """Cost measurements that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class MeasuredCost:
    """Steps timed in the engine: linear between what was measured, and beyond its ends.

    Attributes:
        points: (requests, rows a request, seconds) of each measurement. Every number of requests needs one
            row (plain decoding) and at least one larger block.
    """

    points: Sequence[tuple[int, float, float]]

    def __post_init__(self) -> None:
        """Raises CostError."""
        for requests in self.measured_requests:
            rows, seconds = self._curve(requests)
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
        return sorted({requests for requests, _, _ in self.points})

    def seconds(self, requests: int, rows: float, context: float = 0.0) -> float:
        """The context that was measured with is taken for every other: short next to the model's weights."""
        measured = self.measured_requests
        each = [_line(*self._curve(n), rows / requests) for n in measured]
        return float(_line(np.array(measured, float), np.array(each), requests))

    def _curve(self, requests: int) -> tuple[np.ndarray, np.ndarray]:
        curve = sorted((rows, s) for n, rows, s in self.points if n == requests)
        return np.array([rows for rows, _ in curve]), np.array([s for _, s in curve])


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
    """

    weight_bytes: float
    flops_per_row: float
    kv_bytes_per_token: float
    bytes_per_second: float
    flops_per_second: float
    overhead: float
    block_overhead: float

    def seconds(self, requests: int, rows: float, context: float) -> float:
        products = max(
            self.weight_bytes / self.bytes_per_second,
            rows * self.flops_per_row / self.flops_per_second,
        )
        kv = requests * context * self.kv_bytes_per_token / self.bytes_per_second
        blocks = self.block_overhead if rows > requests else 0.0
        return products + kv + self.overhead + blocks


# Llama-3.1-8B in bf16: 8.03e9 parameters less the input embedding's 0.53e9 (128256 x 4096), of which a step
# reads single rows; KV: 32 layers, 8 heads of 128, keys and values. An H100 SXM as measured with
# benchmarks/kernels.py's copy and a 8192-cubed product: 3.0 TB/s, 800 TFLOP/s. The overheads are
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

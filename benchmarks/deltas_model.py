"""The seconds of a step's low-rank deltas on a GPU, from the launches of `add_mask_lora`."""

import math
from dataclasses import dataclass
from typing import Protocol

from attention_model import VALUE, Device
from bita_kernels.add_mask_lora import MAX_ROW_PROGRAMS, choose_tiles

from bita_vllm.adapter.model_size import ModelSize

DELTA_LAUNCH = 2.7e-6  # of a delta's kernel: it depends on the one before (AUDIT 14)
ARRIVAL = (
    1e-6  # from the last shrink program to the expand programs that wait for it (an assumption)
)
RANK = 16  # of the shipped adapter's deltas
PARTIAL = 4  # bytes of a low feature's sum over a split


class Deltas(Protocol):
    """A version of the kernel."""

    def seconds(self, device: Device, model: ModelSize, mask_rows: int) -> float:
        """All fused layers of a step."""


@dataclass(frozen=True)
class AuditedDeltas:
    """As the audit counted it at 4bb899c: two launches a fused layer, which hide everything else."""

    launches: int = 2

    def seconds(self, device: Device, model: ModelSize, mask_rows: int) -> float:
        layers = model.num_layers * len(fused_layers(model))
        return DELTA_LAUNCH * self.launches * layers


@dataclass(frozen=True)
class CurrentDeltas:
    """One launch a fused layer; programs move bytes at an SM's share of the level 2 cache's speed."""

    rank: int = RANK

    def seconds(self, device: Device, model: ModelSize, mask_rows: int) -> float:
        each = (self._layer(device, *layer, mask_rows) for layer in fused_layers(model))
        return model.num_layers * sum(each)

    def _layer(self, device: Device, inputs: int, outputs: int, parts: int, rows: int) -> float:
        tiles = choose_tiles(inputs, self.rank, VALUE)
        row_tiles = math.ceil(rows / tiles.rows)
        low_features = parts * self.rank
        splits = math.ceil(inputs / tiles.split)
        turns = math.ceil(row_tiles / MAX_ROW_PROGRAMS)
        shrink_programs = math.ceil(low_features / tiles.low) * splits
        expand_programs = math.ceil(outputs / tiles.out) + parts - 1
        shrink = VALUE * tiles.split * (tiles.rows + tiles.low)
        expand = PARTIAL * splits * tiles.rows * tiles.rank + VALUE * tiles.out * tiles.rank
        expand += 2 * VALUE * tiles.rows * tiles.out  # the output is read and written

        def moved(bytes_each: int, programs: int) -> float:
            """The longer of the longest program and of all of them."""
            longest = turns * bytes_each * device.sms
            return max(longest, row_tiles * programs * bytes_each) / device.l2_bytes

        weights = VALUE * (low_features * inputs + self.rank * outputs)
        work = moved(shrink, shrink_programs) + moved(expand, expand_programs)
        return DELTA_LAUNCH + ARRIVAL + max(work, weights / device.speed.bytes_per_second)


def fused_layers(model: ModelSize) -> tuple[tuple[int, int, int], ...]:
    """Input features, output features and parts of the fused linear layers of a decoder layer."""
    query = model.num_q_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    return (
        (model.hidden_size, query + 2 * keys, 3),
        (query, model.hidden_size, 1),
        (model.hidden_size, 2 * model.intermediate_size, 2),
        (model.intermediate_size, model.hidden_size, 1),
    )

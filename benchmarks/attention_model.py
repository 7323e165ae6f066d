"""The seconds of one layer's tree attention on a GPU, from the programs that its launch consists of."""

import csv
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from bita_kernels.attention_config import COMBINE_HEADS, EARLY_SM, AttentionConfig
from bita_kernels.tree_attention import IN_TURN_SHARE, PROGRAMS_PER_PROCESSOR, SHORT_CONTEXT
from bita_kernels.tree_attention_models import shipped

from bita_vllm.adapter.model_size import ModelSize
from bita_vllm.attention.workspaces import side_by_side_requests
from bita_vllm.system.machine import READ_SHARE, DeviceSpeed

COMPILED = Path(__file__).parent / "results" / "kernels_aot.csv"
PRODUCT_SHARE = (
    0.657  # 650 TFLOP/s on an H100: what products of some hundred rows may reach (an assumption)
)
VALUE = 2  # bytes of a bf16 value
PROMPT_TOKENS = 16
# From asking for a tile to having multiplied it where nothing else is under way: memory latency under load
# (0.7-0.8 us by Little's law), page lookup, barrier (AUDIT 5).
TILE_LATENCY = 1.0e-6
TILE_FLOPS_SHARE = 0.45  # of an SM's peak, in 64 x 32 tiles with their softmax
# The assumptions from here on are for the kernel as it is now; the audit did without them.
TILE_CHAIN = (
    0.4e-6  # of a tile that has arrived: products, maxima, exponentials, barriers; ~700 cycles
)
# That the next one waits for (AUDIT 4: two of them take 1 us). An idle H100's memory answers after some 480 cycles,
# its level 2 cache after 260 (Luo et al. 2024, arXiv:2402.13499): 0.27 and 0.15 us. The rest is for traffic and starts.
LOAD = 0.5e-6
PROGRAM_START = 3 * LOAD  # query_start, seq_lens and line; the first page number; the first keys
EMPTY_PROGRAM = LOAD  # one that finds no part for it: the first of these, as compiled for sm_90
FEWEST_MULTIPLIED_ROWS = 64  # smaller tiles leave tensor cores idle: they save no time
MAX_SEQ_LEN = 131072  # that an engine makes its workspace for: Llama-3.1's
COMBINE = (
    3.5e-6  # launching the merge, its first loads (AUDIT 6): also where it finds nothing to merge
)
# Of that, what the attention hides where its merge starts early: a launch in a CUDA graph (1.3 us for an empty kernel
# on an H100: Spector et al. 2025, "Look Ma, No Bubbles!") and the first load. An assumption: nobody has timed it.
EARLY_COMBINE = 1.3e-6 + LOAD
COMBINE_PART = 0.2e-6  # of each part: three of them are under way, at 0.6 us from the level 2 cache
L2_SHARE = 0.6  # of the level 2 cache that partial results may take and stay there


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it; `speed` is what is reached of it.

    Attributes:
        sm: compute capability, as `bita_kernels.aot` counts it.
        sms: streaming multiprocessors.
        peak_bytes: a second, of its memory.
        peak_flops: a second, bf16 products with fp32 sums, dense.
        l2_bytes: a second, what its level 2 cache gives (published microbenchmarks; +-20%).
        l2_size: bytes of the level 2 cache.
    """

    name: str
    sm: int
    sms: int
    peak_bytes: float
    peak_flops: float
    l2_bytes: float
    l2_size: float

    @property
    def speed(self) -> DeviceSpeed:
        return DeviceSpeed(READ_SHARE * self.peak_bytes, PRODUCT_SHARE * self.peak_flops)

    def multiplied(self, rows: int, keys: int, head_size: int) -> float:
        """Seconds of an SM for the products of a tile of tree attention."""
        flops = 4 * rows * keys * head_size
        return flops * self.sms / (TILE_FLOPS_SHARE * self.peak_flops)


class TreeAttention(Protocol):
    """A version of the kernel."""

    def seconds(
        self,
        device: Device,
        model: ModelSize,
        requests: int,
        rows: int,
        context: float,
        widest: int,
    ) -> float:
        """One layer, merging of its splits included; `widest`: rows of the engine's widest block."""


@dataclass(frozen=True)
class AuditedAttention:
    """As the audit read it at 4bb899c: equal splits, one program each, no cost of starting."""

    tile_rows: int = 64
    tile_keys: int = 32
    buffers: int = 2
    programs_per_sm: int = 1
    split: int = 512

    def seconds(
        self,
        device: Device,
        model: ModelSize,
        requests: int,
        rows: int,
        context: float,
        widest: int,
    ) -> float:
        group = model.num_q_heads // model.num_kv_heads
        query_tiles = math.ceil(rows * group / self.tile_rows)
        programs = requests * model.num_kv_heads * query_tiles
        splits = math.ceil(context / self.split)
        # With programs enough for two waves they go through a request's splits in turn.
        in_turn = programs >= 2 * device.sms * self.programs_per_sm or splits == 1
        tiles = math.ceil((context if in_turn else self.split) / self.tile_keys)
        tiles += math.ceil((rows + (PROMPT_TOKENS if rows > 1 else 0)) / self.tile_keys)
        if not in_turn:
            programs *= splits
        waves = math.ceil(programs / (device.sms * self.programs_per_sm))
        multiplied = device.multiplied(self.tile_rows, self.tile_keys, model.head_size)
        tile = max(TILE_LATENCY / (self.buffers - 1), multiplied * self.programs_per_sm)
        slots = requests * (context + rows) * VALUE * model.kv_values_per_token / model.num_layers
        read = slots / device.speed.bytes_per_second
        read_again = query_tiles * slots / device.l2_bytes
        merged = 0.0
        if not in_turn:
            partial = 4 * requests * rows * model.num_q_heads * model.head_size
            merged = COMBINE + 2 * splits * partial / device.l2_bytes
        return max(waves * tiles * tile, read, read_again) + merged


@dataclass(frozen=True)
class Shape:
    """What of a layer a workspace is made for."""

    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    config: AttentionConfig

    @classmethod
    @cache
    def of(cls, model: ModelSize, widest: int) -> "Shape":
        """Of an engine whose widest block has so many rows."""
        group = model.num_q_heads // model.num_kv_heads
        config = AttentionConfig.choose(
            model.head_size, torch.bfloat16, group, widest, num_kv_heads=model.num_kv_heads
        )
        return cls(model.num_q_heads, model.num_kv_heads, group, model.head_size, config)


@dataclass(frozen=True)
class CurrentAttention:
    """As the kernel's own rules cut it; programs and buffers of an SM are those that were compiled."""

    def seconds(
        self,
        device: Device,
        model: ModelSize,
        requests: int,
        rows: int,
        context: float,
        widest: int,
    ) -> float:
        shape = Shape.of(model, widest)
        config = shape.config
        query_tiles = math.ceil(rows * shape.num_queries_per_kv / config.block_m)
        tiles = query_tiles * model.num_kv_heads * requests
        splits = split_lengths(config, math.ceil(context))
        most = side_by_side_requests(shape, widest, MAX_SEQ_LEN, device.sms)
        parallel = requests <= most
        resident, buffers = compiled(model.head_size, config.block_m, parallel, device.sm)

        own_tiles = math.ceil(rows / config.block_n)
        own_tiles += math.ceil(PROMPT_TOKENS / config.block_n) if rows > 1 else 0
        multiplied_rows = max(config.block_m, FEWEST_MULTIPLIED_ROWS)
        multiplied = device.multiplied(multiplied_rows, config.block_n, model.head_size)
        wanted, num_programs = PROGRAMS_PER_PROCESSOR * device.sms, 2
        if parallel:
            num_programs = config.num_programs(tiles, wanted, MAX_SEQ_LEN)
        programs = min(tiles * (num_programs - 1 if parallel else 1), device.sms * resident)
        tile_seconds = max(
            TILE_LATENCY / (buffers - 1),
            TILE_CHAIN,
            multiplied * math.ceil(programs / device.sms),
        )
        # The own part's loads do not run ahead: its first tiles cost their latency each.
        start = PROGRAM_START / tile_seconds
        own = start + own_tiles * TILE_LATENCY / tile_seconds
        context_tiles = [math.ceil(length / config.block_n) for length in splits]
        # Tiles of a request's query rows share what they read by way of the level 2 cache.
        tile_bytes = 2 * config.block_n * model.head_size * VALUE
        most_bytes = min(query_tiles * device.speed.bytes_per_second, device.l2_bytes)
        pace = Pace(tile_seconds, tile_bytes / most_bytes, device.sms * resident)
        if not parallel:
            return pace.seconds_of_equal(tiles, own + sum(context_tiles))
        # From the last split to the first: a program strides over them.
        step, longest_first = num_programs - 1, context_tiles[::-1]
        short = config.short_in_turn(model.head_size) and context < SHORT_CONTEXT
        if tiles >= IN_TURN_SHARE * wanted and short:
            work = [own + sum(context_tiles), *[EMPTY_PROGRAM / tile_seconds] * step]
            return launch_of_merge(device) + pace.seconds(
                [one for one in work for _ in range(tiles)]
            )
        striding = [longest_first[i::step] for i in range(min(step, len(splits)))]
        empty = [EMPTY_PROGRAM / tile_seconds] * (step - len(striding))
        # Loads do not run ahead from one split to the next.
        gap = TILE_LATENCY / tile_seconds
        runs = [start + sum(run) + gap * (len(run) - 1) for run in striding]
        work = [own, *runs, *empty]
        read = pace.seconds([one for one in work for _ in range(tiles)])
        return read + self._merged(device, model, requests * rows, len(splits) + 1)

    def _merged(self, device: Device, model: ModelSize, rows: int, parts: int) -> float:
        """What writing partial results and merging them takes."""
        partials = 4 * rows * model.num_q_heads * (model.head_size + 2) * parts
        stays = partials <= L2_SHARE * device.l2_size
        speed = device.l2_bytes if stays else device.speed.bytes_per_second
        programs = rows * math.ceil(model.num_q_heads / COMBINE_HEADS)
        waves = math.ceil(programs / (12 * device.sms))  # 12 programs of 4 warps an SM
        merged = max(waves * parts * COMBINE_PART, partials / speed)
        return launch_of_merge(device) + merged + partials / speed


def launch_of_merge(device: Device) -> float:
    """Seconds from the end of the attention until its merge has something to do, or has found nothing."""
    return COMBINE - (EARLY_COMBINE if device.sm >= EARLY_SM else 0.0)


def split_lengths(config: AttentionConfig, context: int) -> list[int]:
    """Slots of each split of a context."""
    lengths, length, begin = [], config.split, 0
    while begin < context:
        lengths.append(min(length, context - begin))
        begin += length
        # From 2 * per_doubling splits on, each further per_doubling are twice as long.
        if len(lengths) >= 2 * config.per_doubling and len(lengths) % config.per_doubling == 0:
            length *= 2
    return lengths


@cache
def compiled(head_size: int, block_m: int, parallel: bool, sm: int) -> tuple[int, int]:
    """Programs of an SM and buffers of a program; those of a larger tile where none was compiled of that size."""
    with COMPILED.open() as file:
        rows = {(row["configuration"], int(row["sm"])): row for row in csv.DictReader(file)}
    found: dict[int, tuple[int, int]] = {}
    for one in shipped():
        constants = one.constexprs
        if constants.get("PARALLEL") != parallel or one.signature.get("q_ptr") != "*bf16":
            continue
        if constants["HEAD_SIZE"] == head_size and not constants["WINDOW"]:
            row = rows[one.name, sm]
            found[constants["BLOCK_M"]] = int(row["programs"]), int(row["buffers"])
    return found[min(size for size in found if size >= block_m)]


@dataclass(frozen=True)
class Pace:
    """How fast programs get through tiles: each at its own pace, all of them at the memory's.

    Attributes:
        tile_seconds: of a program, from tile to tile.
        shared_seconds: of all programs together, for each tile of one of them.
        slots: programs that run at a time.
    """

    tile_seconds: float
    shared_seconds: float
    slots: int

    def _of(self, programs: int) -> float:
        return max(self.tile_seconds, programs * self.shared_seconds)

    def seconds_of_equal(self, programs: int, work: float) -> float:
        """Of programs with `work` tiles each, in waves."""
        waves, rest = divmod(programs, self.slots)
        return work * (waves * self._of(self.slots) + (self._of(rest) if rest else 0.0))

    def seconds(self, work: Sequence[float]) -> float:
        """Of programs in the order of their start; one starts where another ends."""
        seconds, tiles, started = 0.0, 0.0, min(self.slots, len(work))
        running = list(
            work[: self.slots]
        )  # the number of tiles, of each program that runs, when it ends
        heapq.heapify(running)
        while running:
            ends = running[0]
            seconds += (ends - tiles) * self._of(len(running))
            tiles = ends
            heapq.heappop(running)
            if started < len(work):
                heapq.heappush(running, tiles + work[started])
                started += 1
        return seconds

"""The seconds of each kernel and of a whole step on a GPU, from its data sheet and from how the kernels are cut."""

import math
from dataclasses import dataclass, fields, replace

from bita_vllm.machine import READ_SHARE, DeviceSpeed
from bita_vllm.model_size import ModelSize
from bita_vllm.tuning.cost import LAYER_OVERHEAD, STEP_OVERHEAD

VALUE = 2  # bytes of a bf16 value
FUSED_LAYERS = 4  # of a decoder layer: qkv, o, gate and up, down

# --- Devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it; `speed` is what is reached of it.

    Attributes:
        sms: streaming multiprocessors.
        peak_bytes: a second, of its memory.
        peak_flops: a second, bf16 products with fp32 sums, dense.
        l2_bytes: a second, what its level 2 cache gives (published microbenchmarks; +-20%).
    """

    name: str
    sms: int
    peak_bytes: float
    peak_flops: float
    l2_bytes: float

    @property
    def speed(self) -> DeviceSpeed:
        return DeviceSpeed(READ_SHARE * self.peak_bytes, PRODUCT_SHARE * self.peak_flops)


DEVICES = {
    "H100": Device("H100 SXM", 132, 3.35e12, 989e12, 5.5e12),
    "H200": Device("H200 SXM", 132, 4.8e12, 989e12, 5.5e12),
    "A100": Device("A100 SXM 80GB", 108, 2.039e12, 312e12, 4.0e12),
}
PRODUCT_SHARE = (
    0.657  # 650 TFLOP/s on an H100: what products of some hundred rows may reach (an assumption)
)
LAUNCH = 2.5e-6  # seconds of a small kernel in a CUDA graph or right after another one (AUDIT 8)
DELTA_LAUNCH = 2.7e-6  # of a delta's kernel: it depends on the one before (AUDIT 14)
# From asking for a tile to having multiplied it where nothing else is under way: memory latency under load
# (0.7-0.8 us by Little's law), page lookup, barrier (AUDIT 5).
TILE_LATENCY = 1.0e-6
TILE_FLOPS_SHARE = 0.45  # of an SM's peak, in 64 x 32 tiles with their softmax
COMBINE = 3.5e-6  # merging splits (AUDIT 6)
FLASH_FLOOR = 6e-6  # a layer's FlashAttention 3 at one request (AUDIT 6)
LOGIT_PASSES = 4  # over the fp32 logits of a node row: written by the LM head, read by the sampler

# --- Models ---------------------------------------------------------------------------------------

MODELS = {
    "Llama-3-8B": ModelSize(32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen3-4B": ModelSize(36, 2560, 9728, 32, 8, 128, 151936),
    "SmolLM2-135M": ModelSize(30, 576, 1536, 9, 3, 64, 49152),
}

PROMPT_TOKENS = 16
NODE_SHARE = 0.45  # of a block's rows, the root included: 7-10 of 16, 28 of 52 in the shipped sets

# --- Implementations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """How the code is cut: what the model knows of it.

    Attributes:
        tile_rows, tile_keys: of a tile of tree attention.
        buffers: tiles of keys and values that a program holds; one less are under way while one is multiplied.
        programs_per_sm: of tree attention.
        split: KV slots of the shortest splits.
        per_doubling: splits, each twice as long as those before, that a doubling of the context adds once it has
            twice as many; 0 if all are equally long.
        single_pass_rows: rows of a step up to which one pass of the LM head serves nodes and masks.
        launches: small kernels of a step with blocks over plain's.
        plain_launches: of a step without blocks.
        delta_launches: of one fused linear layer.
        plain_is_stock: steps without blocks run what plain vLLM runs, otherwise the tree kernel.
    """

    tile_rows: int
    tile_keys: int
    buffers: int
    programs_per_sm: int
    split: int
    per_doubling: int
    single_pass_rows: int
    launches: int
    plain_launches: int
    delta_launches: int
    plain_is_stock: bool

    def splits(self, context: float) -> tuple[int, int]:
        """How many a context has, and the slots of the longest one."""
        number, longest = math.ceil(context / self.split), self.split
        if self.per_doubling and number > 2 * self.per_doubling:
            doublings = math.log2(context / (2 * self.per_doubling * self.split))
            number = math.ceil(self.per_doubling * (2 + doublings))
            longest *= 2 ** math.ceil(doublings)
        return max(number, 1), longest


IMPLEMENTATIONS = {
    "before": Implementation(
        tile_rows=64,
        tile_keys=32,
        buffers=2,
        programs_per_sm=1,
        split=512,
        per_doubling=0,
        single_pass_rows=0,
        launches=90,
        plain_launches=10,
        delta_launches=2,
        plain_is_stock=False,
    ),
    "mended": Implementation(
        tile_rows=64,
        tile_keys=32,
        buffers=3,
        programs_per_sm=1,
        split=256,
        per_doubling=0,
        single_pass_rows=128,
        launches=20,
        plain_launches=0,
        delta_launches=1,
        plain_is_stock=True,
    ),
}

# --- The model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by kernel."""

    products: float  # of the decoder's layers
    lm_head: float
    attention: float
    activations: float  # norms, rotary positions, activation functions, logits
    deltas: float
    launches: float
    overhead: float  # that plain vLLM has too: graph, sampling, scheduling that nothing hides

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class PerformanceModel:
    """Seconds of steps of one model on one device; a `StepCost`, so that the simulator takes it too."""

    device: Device
    model: ModelSize
    implementation: Implementation
    has_deltas: bool = True

    def plain(self, requests: int, context: float) -> Step:
        """Plain vLLM: FlashAttention, one pass of everything."""
        model = self.model
        return Step(
            products=self._product(model.layer_params, requests),
            lm_head=self.lm_head(requests),
            attention=model.num_layers * self.flash_attention(requests, context),
            activations=self._activations(requests, requests),
            deltas=0.0,
            launches=0.0,
            overhead=STEP_OVERHEAD + LAYER_OVERHEAD * model.num_layers,
        )

    def step(self, requests: int, rows: int, context: float) -> Step:
        """bita with `rows` rows a request; 1 is a step without blocks."""
        code, model, plain = self.implementation, self.model, self.plain(requests, context)
        attention = model.num_layers * self.tree_attention(requests, rows, context)
        if rows == 1:
            launches = LAUNCH * code.plain_launches
            return (
                plain
                if code.plain_is_stock
                else replace(plain, attention=attention, launches=launches)
            )
        all_rows, nodes = requests * rows, requests * math.ceil(NODE_SHARE * rows)
        if all_rows <= code.single_pass_rows:
            lm_head = self.lm_head(all_rows)
        else:
            lm_head = self.lm_head(nodes) + self.lm_head(requests)
        kernels_of_deltas = model.num_layers * FUSED_LAYERS * code.delta_launches
        return replace(
            plain,
            products=self._product(model.layer_params, all_rows),
            lm_head=lm_head,
            attention=attention,
            activations=self._activations(all_rows, nodes),
            deltas=DELTA_LAUNCH * kernels_of_deltas if self.has_deltas else 0.0,
            launches=LAUNCH * code.launches,
        )

    def _activations(self, rows: int, logit_rows: int) -> float:
        """What layers write and read besides weights, in the level 2 cache; logits in memory."""
        model, device = self.model, self.device
        of_layer = 8 * model.hidden_size + 3 * model.intermediate_size
        of_layer += 2 * (model.num_q_heads + 2 * model.num_kv_heads) * model.head_size
        logits = 4 * LOGIT_PASSES * logit_rows * model.vocab_size
        in_layers = VALUE * rows * model.num_layers * of_layer
        return in_layers / device.l2_bytes + logits / device.speed.bytes_per_second

    def _product(self, params: float, rows: int) -> float:
        """The longer of reading the weights and multiplying."""
        speed = self.device.speed
        return max(
            VALUE * params / speed.bytes_per_second, 2 * params * rows / speed.flops_per_second
        )

    def lm_head(self, rows: int) -> float:
        """One pass of the output head."""
        return self._product(self.model.head_params, rows)

    def flash_attention(self, requests: int, context: float) -> float:
        """One layer of FlashAttention 3, one row a request."""
        model = self.model
        kv = requests * context * VALUE * model.kv_values_per_token / model.num_layers
        return max(FLASH_FLOOR, kv / self.device.speed.bytes_per_second)

    def tree_attention(self, requests: int, rows: int, context: float) -> float:
        """One layer, merging of its splits included."""
        code, model, device = self.implementation, self.model, self.device
        group = model.num_q_heads // model.num_kv_heads
        query_tiles = math.ceil(rows * group / code.tile_rows)
        programs = requests * model.num_kv_heads * query_tiles
        splits, longest = code.splits(context)
        # With programs enough for two waves they go through a request's splits in turn.
        in_turn = programs >= 2 * device.sms * code.programs_per_sm or splits == 1
        tiles = math.ceil((context if in_turn else longest) / code.tile_keys)
        tiles += math.ceil((rows + (PROMPT_TOKENS if rows > 1 else 0)) / code.tile_keys)
        if not in_turn:
            programs *= splits
        waves = math.ceil(programs / (device.sms * code.programs_per_sm))
        in_time = waves * tiles * self.tile_seconds()
        slots = requests * (context + rows) * VALUE * model.kv_values_per_token / model.num_layers
        read = slots / device.speed.bytes_per_second
        read_again = query_tiles * slots / device.l2_bytes
        merged = 0.0
        if not in_turn:
            partial = 4 * requests * rows * model.num_q_heads * model.head_size
            merged = COMBINE + 2 * splits * partial / device.l2_bytes
        return max(in_time, read, read_again) + merged

    def tile_seconds(self) -> float:
        """From one tile to the next in a program: its memory or its products."""
        code, device = self.implementation, self.device
        flops = 4 * code.tile_rows * code.tile_keys * self.model.head_size
        multiplied = flops * device.sms / (TILE_FLOPS_SHARE * device.peak_flops)
        return max(TILE_LATENCY / (code.buffers - 1), multiplied * code.programs_per_sm)

    def seconds(self, requests: int, rows: float, context: float) -> float:
        """As `bita_vllm.tuning.cost.StepCost` has it: rows of all requests."""
        if rows <= requests:
            return self.step(requests, 1, context).total
        return self.step(requests, round(rows / requests), context).total

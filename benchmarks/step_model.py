"""The seconds of each kernel and of a whole step on a GPU, from its data sheet and from how the kernels are cut."""

import math
from dataclasses import dataclass, fields, replace

from attention_model import (
    VALUE,
    AuditedAttention,
    CurrentAttention,
    Device,
    TreeAttention,
)
from deltas_model import AuditedDeltas, CurrentDeltas, Deltas

from bita_vllm.adapter.model_size import ModelSize
from bita_vllm.runner.gpu_logits import KNEES_IN_ONE_PASS
from bita_vllm.tree.step_cost import LAYER_OVERHEAD, STEP_OVERHEAD

# --- Devices --------------------------------------------------------------------------------------

DEVICES = {
    "H100": Device("H100 SXM", 90, 132, 3.35e12, 989e12, 5.5e12, 50e6),
    "H200": Device("H200 SXM", 90, 132, 4.8e12, 989e12, 5.5e12, 50e6),
    "A100": Device("A100 SXM 80GB", 80, 108, 2.039e12, 312e12, 4.0e12, 40e6),
}
LAUNCH = 2.5e-6  # seconds of a small kernel in a CUDA graph or right after another one (AUDIT 8)
FLASH_FLOOR = 6e-6  # a layer's FlashAttention 3 at one request (AUDIT 6)
LOGIT_PASSES = 4  # over the fp32 logits of a node row: written by the LM head, read by the sampler

# --- Models ---------------------------------------------------------------------------------------

MODELS = {
    "Llama-3-8B": ModelSize(32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen3-4B": ModelSize(36, 2560, 9728, 32, 8, 128, 151936),
    "SmolLM2-135M": ModelSize(30, 576, 1536, 9, 3, 64, 49152),
}

# Of a block's rows, by the set's trees with most nodes and with most masks: the LM head has room for both.
MASK_SHARE = 0.72  # 16 rows: 10 with deltas, 9 without; 32 rows: 21 and 16; 52 rows: 37 and 27
NODE_SHARE = 0.45  # of a block's rows, the root included: 7-10 of 16, 28 of 52 in the shipped sets

# --- Implementations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """How the code is cut: what the model knows of it.

    Attributes:
        attention: the kernel of steps with blocks.
        deltas: the kernel of the mask rows' low-rank deltas.
        single_pass_knees: rows of a step, nodes and masks, over the device's knee, up to which one pass of the LM head
            serves both.
        launches: small kernels of a step with blocks over plain's.
        plain_launches: of a step without blocks.
        plain_is_stock: steps without blocks run what plain vLLM runs, otherwise the tree kernel.
    """

    attention: TreeAttention
    deltas: Deltas
    single_pass_knees: float
    launches: int
    plain_launches: int
    plain_is_stock: bool


IMPLEMENTATIONS = {
    "before": Implementation(
        attention=AuditedAttention(),
        deltas=AuditedDeltas(),
        single_pass_knees=0.0,
        launches=90,
        plain_launches=10,
        plain_is_stock=False,
    ),
    # launches: tests/e2e/test_launches.py counts two more than plain's
    "mended": Implementation(
        attention=CurrentAttention(),
        deltas=CurrentDeltas(),
        single_pass_knees=KNEES_IN_ONE_PASS,
        launches=2,
        plain_launches=0,
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
    """Seconds of steps of one model on one device; a `StepCost`, so that the simulator takes it too.

    `widest`: rows of the widest block of the engine, which tiles and splits of attention follow.
    """

    device: Device
    model: ModelSize
    implementation: Implementation
    has_deltas: bool = True
    widest: int = 1

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
        masks = requests * math.ceil(MASK_SHARE * rows)
        if nodes + masks <= int(code.single_pass_knees * self.device.speed.knee):
            # All mask rows get logits, in bf16; the next blocks read few of them.
            written = VALUE * masks * model.vocab_size
            lm_head = self.lm_head(nodes + masks) + written / self.device.speed.bytes_per_second
        else:
            lm_head = self.lm_head(nodes) + self.lm_head(requests)
        return replace(
            plain,
            products=self._product(model.layer_params, all_rows),
            lm_head=lm_head,
            attention=attention,
            activations=self._activations(all_rows, nodes),
            deltas=code.deltas.seconds(self.device, model, masks) if self.has_deltas else 0.0,
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
        kernel, widest = self.implementation.attention, max(self.widest, rows)
        return kernel.seconds(self.device, self.model, requests, rows, context, widest)

    def seconds(self, requests: int, rows: float, context: float) -> float:
        """As `bita_vllm.tree.step_cost.StepCost` has it: rows of all requests."""
        if rows <= requests:
            return self.step(requests, 1, context).total
        return self.step(requests, round(rows / requests), context).total

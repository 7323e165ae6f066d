"""What kernel_benchmark.py measures on: one decode step's attention, as a layer of a served model sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 16
# Copies of the KV cache are visited in turn, as layers are, until they outgrow a GPU's L2 cache.
WORKING_SET = 256 * 2**20
MAX_LAYERS = 32


@dataclass(frozen=True)
class Shape:
    """Attention of one model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = {
    shape.name: shape
    for shape in (
        # Both models have the same attention, so one row stands for both.
        Shape("Llama-3-8B/Qwen3-4B", 32, 8, 128),
        Shape("SmolLM2-135M", 9, 3, 64),
    )
}


@dataclass
class Case:
    """B requests with the same committed context, a step block of R rows each.

    Rows hang in a binary tree. The last three quarters of a block are mask rows, as in the paper's tree
    (39 of 52); they alone see the prompt tokens, which only our kernel knows: peers do a little less.
    """

    shape: Shape
    context: int
    num_requests: int
    num_rows: int
    dtype: torch.dtype
    device: torch.device
    # longest sequence that the engine takes: what our kernel's splits follow from
    max_model_len: int = 131072
    # [B * R, Hq, D]
    queries: torch.Tensor = field(init=False)
    # one [num_blocks, Hkv, block_size, 2 * D] a layer, as vLLM 0.32 lays it out
    caches: list[torch.Tensor] = field(init=False)
    # [B, blocks of a request] int32, permuted
    block_table: torch.Tensor = field(init=False)
    # [R, R] bool, row i sees row j of its own block
    ancestors: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape, generator = self.shape, torch.Generator(self.device).manual_seed(0)

        def normal(*dims: int) -> torch.Tensor:
            return torch.randn(*dims, generator=generator, device=self.device, dtype=self.dtype)

        blocks = math.ceil(self.num_slots / BLOCK_SIZE)
        num_blocks = self.num_requests * blocks
        self.queries = normal(self.num_requests * self.num_rows, shape.num_q_heads, shape.head_size)
        layer = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, 2 * shape.head_size)
        layer_bytes = math.prod(layer) * self.dtype.itemsize
        num_layers = min(MAX_LAYERS, max(1, WORKING_SET // layer_bytes))
        self.caches = [normal(*layer) for _ in range(num_layers)]
        order = torch.randperm(num_blocks, generator=generator, device=self.device)
        self.block_table = order.view(self.num_requests, blocks).int()
        ancestors = torch.eye(self.num_rows, dtype=torch.bool)
        for row in range(1, self.num_rows):
            ancestors[row] |= ancestors[(row - 1) // 2]
        self.ancestors = ancestors.to(self.device)

    @property
    def num_slots(self) -> int:
        """KV slots of a request: context and own rows."""
        return self.context + self.num_rows

    @property
    def num_nodes(self) -> int:
        """Rows that are not mask rows."""
        return math.ceil(self.num_rows / 4)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.shape.num_q_heads // self.shape.num_kv_heads

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.shape.head_size**-0.5

    @property
    def needed_bytes(self) -> int:
        """What a kernel cannot avoid to move: K/V of every slot once, queries in, outputs out."""
        shape, size = self.shape, self.dtype.itemsize
        kv = self.num_requests * self.num_slots * shape.num_kv_heads * shape.head_size * 2
        return (kv + 2 * self.queries.numel()) * size

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, `[num_blocks, block_size, Hkv, D]` views."""
        keys, values = self.caches[layer].transpose(1, 2).split(self.shape.head_size, dim=3)
        return keys, values

    def gathered(
        self, layer: int, request: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of requests without pages, `[requests, Hkv, slots, D]`: a copy."""
        pages = self.caches[layer][self.block_table[request].long()]
        rows = pages.transpose(1, 2).flatten(2, 3)[:, :, : self.num_slots]
        keys, values = rows.split(self.shape.head_size, dim=3)
        return keys.contiguous(), values.contiguous()

    def visible(self, causal: bool = False) -> torch.Tensor:
        """`[R, slots]` bool: context and ancestors, or every row before."""
        context = self.ancestors.new_ones(self.num_rows, self.context)
        own = torch.ones_like(self.ancestors).tril() if causal else self.ancestors
        return torch.cat([context, own], dim=1)

    def expected(self, request: int, causal: bool = False) -> torch.Tensor:
        """`[nodes, Hq, D]` float64, attention of a request's node rows over layer 0."""
        keys, values = (x[0].double() for x in self.gathered(0, slice(request, request + 1)))
        heads = self.shape.num_kv_heads
        start = request * self.num_rows
        # [Hkv, Hq / Hkv, nodes, D]
        queries = self.queries[start : start + self.num_nodes].double()
        queries = queries.unflatten(1, (heads, -1)).permute(1, 2, 0, 3) * self.scale
        scores = queries @ keys[:, None].transpose(2, 3)
        scores.masked_fill_(~self.visible(causal)[: self.num_nodes], float("-inf"))
        attended = scores.softmax(dim=-1) @ values[:, None]
        return attended.permute(2, 0, 1, 3).flatten(1, 2)

    def error(self, output: torch.Tensor, causal: bool = False) -> float:
        """Largest error of the first and last request's node rows over the largest value there."""
        worst = 0.0
        for request in {0, self.num_requests - 1}:
            start, expected = request * self.num_rows, self.expected(request, causal)
            got = output[start : start + self.num_nodes].double()
            worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
        return worst

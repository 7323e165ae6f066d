"""Attention of the two passes of training: ordinary tokens first, then mask rows over their keys.

transformers hands every attention layer of a decoder to one registered function (its
`AttentionInterface`), with queries and keys already normalised and rotated. Ours, `bita_mask`,
hands them on to the pass at hand, which the decoder carries as the keyword `bita_pass`:

- `ContextPass`: plain causal attention; every layer's keys and values are kept.
- `MaskPass`: mask rows read [prompt tokens | context up to their root | their own group].
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from bita_vllm.training import mask_flex

ATTENTION_NAME = "bita_mask"
# Query rows (of one head and sequence) that are attended to at a time: bounds the mask in memory.
TILE_ROWS = 96


class AttentionPass(Protocol):
    """What the layers' attention does during one forward pass of the decoder."""

    def attend(
        self,
        layer: int,
        # [B, Hq, rows, D]
        query: torch.Tensor,
        # [B, Hkv, rows, D]
        key: torch.Tensor,
        # [B, Hkv, rows, D]
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        # [Hq], logits of attention sinks
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[B, Hq, rows, D]`, the weighted values."""
        ...


@dataclass
class ContextPass:
    """Causal attention over right-padded sequences that keeps all keys and values."""

    keys: list[torch.Tensor] = field(default_factory=list)  # per layer [B, Hkv, T, D], RoPE applied
    values: list[torch.Tensor] = field(default_factory=list)  # per layer [B, Hkv, T, D]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer != len(self.keys):
            raise ValueError(f"attention layer {layer} ran where layer {len(self.keys)} was due")
        self.keys.append(key)
        self.values.append(value)
        length = query.shape[2]
        if softcap is None and sinks is None and (window is None or window >= length):
            repeats = query.shape[1] // key.shape[1]
            return F.scaled_dot_product_attention(
                query,
                key.repeat_interleave(repeats, dim=1),
                value.repeat_interleave(repeats, dim=1),
                is_causal=True,
                scale=scaling,
            )
        outputs = []
        for start in range(0, length, TILE_ROWS):
            end = min(start + TILE_ROWS, length)
            first = 0 if window is None else max(0, start + 1 - window)
            distance = (
                torch.arange(start, end, device=query.device)[:, None]
                - torch.arange(first, end, device=query.device)[None]
            )
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            outputs.append(
                _attend_tile(
                    query[:, :, start:end],
                    key[:, :, first:end],
                    value[:, :, first:end],
                    visible[None],
                    scaling,
                    softcap,
                    sinks,
                )
            )
        return torch.cat(outputs, dim=2)


@dataclass
class MaskPass:
    """Attention of mask rows, `k` a group, over recorded keys and values.

    Groups are ordered by root within a sequence, so that a tile of neighbouring groups reads no
    more context than its last root needs. Windows count positions, as for ordinary tokens; prompt
    tokens have no position and are always seen.
    """

    context_keys: list[torch.Tensor]  # per layer [B, Hkv, T, D], RoPE applied
    context_values: list[torch.Tensor]  # per layer [B, Hkv, T, D]
    prompt_keys: torch.Tensor  # [L, P, Hkv, D], no RoPE
    prompt_values: torch.Tensor  # [L, P, Hkv, D]
    roots: torch.Tensor  # [B, G] positions of the roots, ascending in each sequence
    num_masks: int  # k
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)  # by window

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        batch = len(query)
        front_keys = self.prompt_keys[layer].transpose(0, 1).expand(batch, -1, -1, -1)
        front_values = self.prompt_values[layer].transpose(0, 1).expand(batch, -1, -1, -1)
        if use_flex(query):
            return mask_flex.attend(
                query,
                torch.cat([front_keys, self.context_keys[layer], key], dim=2),
                torch.cat([front_values, self.context_values[layer], value], dim=2),
                self._block_mask(window),
                scaling,
                softcap,
                sinks,
            )
        outputs = []
        groups_per_tile = max(1, TILE_ROWS // self.num_masks)
        for first in range(0, self.roots.shape[1], groups_per_tile):
            roots = self.roots[:, first : first + groups_per_tile]
            tile = MaskTile(roots, self.num_masks, window, softcap, sinks)
            rows = slice(first * self.num_masks, (first + groups_per_tile) * self.num_masks)
            outputs.append(
                _TileAttention.apply(
                    query[:, :, rows] * scaling,
                    front_keys,
                    front_values,
                    key[:, :, rows],
                    value[:, :, rows],
                    self.context_keys[layer][:, :, tile.context],
                    self.context_values[layer][:, :, tile.context],
                    tile,
                )
            )
        return torch.cat(outputs, dim=2)

    def _block_mask(self, window: int | None) -> BlockMask:
        """For FlexAttention; layers with the same window share it."""
        if window not in self._block_masks:
            length, num_prompt = self.context_keys[0].shape[2], self.prompt_keys.shape[1]
            self._block_masks[window] = mask_flex.make_block_mask(
                self.roots, self.num_masks, num_prompt, length, window
            )
        return self._block_masks[window]


@dataclass(frozen=True)
class MaskTile:
    """Some neighbouring mask groups, and what their rows see."""

    roots: torch.Tensor  # [B, groups], ascending
    num_masks: int  # k
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [Hq], not trained

    @property
    def context(self) -> slice:
        """Positions that any row may see."""
        start = 0
        if self.window is not None:
            start = max(0, int(self.roots.min()) + 2 - self.window)
        return slice(start, int(self.roots.max()) + 1)

    def hidden(self, num_prompt_tokens: int) -> torch.Tensor:
        """`[B, rows, P + context + rows]` bool: prompt tokens, context and rows not to be seen."""
        k, (batch, num_groups), device = self.num_masks, self.roots.shape, self.roots.device
        group = torch.arange(num_groups, device=device).repeat_interleave(k)
        place = torch.arange(1, k + 1, device=device).repeat(num_groups)
        positions = torch.arange(self.context.start, self.context.stop, device=device)
        row_roots = self.roots.repeat_interleave(k, dim=1)[..., None]  # [B, rows, 1]
        context = positions > row_roots  # [B, rows, context]
        own = (group[:, None] != group) | (place > place[:, None])  # [rows, rows]
        if self.window is not None:
            context |= row_roots + place[:, None] - positions >= self.window
            own |= place[:, None] - place >= self.window
        prompt = context.new_zeros(batch, num_groups * k, num_prompt_tokens)
        return torch.cat([prompt, context, own.expand(batch, -1, -1)], dim=2)


class _TileAttention(torch.autograd.Function):
    """Attention of a tile's rows. Nothing as large as [rows, keys] is kept for the backward pass,
    which computes the weights again; and the context, which is not trained, gets no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,  # [B, Hq, rows, D], scaled
        front_key: torch.Tensor,  # [B, Hkv, P, D]
        front_value: torch.Tensor,  # [B, Hkv, P, D]
        own_key: torch.Tensor,  # [B, Hkv, rows, D]
        own_value: torch.Tensor,  # [B, Hkv, rows, D]
        context_key: torch.Tensor,  # [B, Hkv, context, D]
        context_value: torch.Tensor,  # [B, Hkv, context, D]
        tile: MaskTile,
    ) -> torch.Tensor:
        batch, num_heads, rows, head_size = query.shape
        # Query heads that share a KV head become rows of it.
        folded = query.reshape(batch, own_key.shape[1], -1, head_size)
        key = torch.cat([front_key, context_key, own_key], dim=2)
        value = torch.cat([front_value, context_value, own_value], dim=2)
        scores = _scores(folded, key, front_key.shape[2], tile)
        largest = scores.amax(dim=-1, keepdim=True)  # finite: a row sees itself
        weights = scores.sub_(largest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if tile.sinks is not None:
            # A key whose value is zero: it adds to the sum, and to nothing else.
            total += torch.exp(_by_row(tile.sinks, folded) - largest)
        output = (weights.to(value.dtype) @ value).div_(total)
        log_sum = total.log_().add_(largest)
        ctx.save_for_backward(
            folded, front_key, front_value, own_key, own_value, context_key, context_value
        )
        ctx.output, ctx.log_sum, ctx.tile = output, log_sum, tile
        return output.view(batch, num_heads, rows, head_size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        folded, front_key, front_value, own_key, own_value, context_key, context_value = (
            ctx.saved_tensors
        )
        num_prompt, rows = front_key.shape[2], own_key.shape[2]
        key = torch.cat([front_key, context_key, own_key], dim=2)
        value = torch.cat([front_value, context_value, own_value], dim=2)
        shape, grad = grad.shape, grad.reshape(folded.shape)
        scores = _scores(folded, key, num_prompt, ctx.tile)
        weights = (scores - ctx.log_sum).exp_()
        mean = at_least_float32((grad * ctx.output).sum(dim=-1, keepdim=True))
        grad_scores = weights * (at_least_float32(grad @ value.transpose(2, 3)) - mean)
        if ctx.tile.softcap is not None:
            capped = scores.masked_fill(scores == -torch.inf, 0) / ctx.tile.softcap
            grad_scores *= 1 - capped.square_()
        grad_scores, weights = grad_scores.to(key.dtype), weights.to(key.dtype)
        trained = (slice(0, num_prompt), slice(key.shape[2] - rows, None))
        grad_keys = [grad_scores[..., part].transpose(2, 3) @ folded for part in trained]
        grad_values = [weights[..., part].transpose(2, 3) @ grad for part in trained]
        return (
            (grad_scores @ key).view(shape),
            grad_keys[0],
            grad_values[0],
            grad_keys[1],
            grad_values[1],
            None,
            None,
            None,
        )


def _scores(
    query: torch.Tensor,  # [B, Hkv, repeats * rows, D], scaled
    key: torch.Tensor,  # [B, Hkv, keys, D]
    num_prompt_tokens: int,
    tile: MaskTile,
) -> torch.Tensor:
    """`[B, Hkv, repeats * rows, keys]`, -inf where a row does not look; at least fp32."""
    scores = at_least_float32(query @ key.transpose(2, 3))
    if tile.softcap is not None:
        scores = scores.div_(tile.softcap).tanh_().mul_(tile.softcap)
    hidden = tile.hidden(num_prompt_tokens)[:, None, None]
    by_head = scores.unflatten(2, (-1, hidden.shape[3]))
    return by_head.masked_fill_(hidden, -torch.inf).flatten(2, 3)


def _by_row(
    # [Hq]
    sinks: torch.Tensor,
    # [B, Hkv, repeats * rows, D]
    folded: torch.Tensor,
) -> torch.Tensor:
    """`[Hkv, repeats * rows, 1]`, the sink that each row sees; at least fp32."""
    num_kv_heads, rows = folded.shape[1:3]
    by_head = at_least_float32(sinks).view(num_kv_heads, -1, 1)
    return by_head.expand(-1, -1, rows // by_head.shape[1]).reshape(num_kv_heads, rows, 1)


def _attend_tile(
    # [B, Hq, rows, D]
    query: torch.Tensor,
    # [B, Hkv, keys, D]
    key: torch.Tensor,
    # [B, Hkv, keys, D]
    value: torch.Tensor,
    # [B or 1, rows, keys] bool
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None,
    # [Hq]
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, Hq, rows, D]`. Query heads that share a KV head are folded into its rows."""
    batch, num_heads, rows, head_size = query.shape
    num_kv_heads = key.shape[1]
    repeats = num_heads // num_kv_heads
    query = query.reshape(batch, num_kv_heads, repeats * rows, head_size)
    visible = visible.repeat(1, repeats, 1)[:, None]
    if softcap is None and sinks is None:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    else:
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = at_least_float32(scores).masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = _by_row(sinks, query).expand(batch, -1, -1, -1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[2]]
        output = weights.to(value.dtype) @ value
    return output.reshape(batch, num_heads, rows, head_size)


def use_flex(query: torch.Tensor) -> bool:
    """FlexAttention on GPUs; on CPUs it has no backward pass, and tiles do it."""
    return query.is_cuda


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision is widened, where sums over many terms follow."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    bita_pass: AttentionPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[B, heads, rows, D]` each -> `[B, rows, Hq, D]`."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # modules type all attributes
    output = bita_pass.attend(layer, query, key, value, scaling, sliding_window, softcap, s_aux)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, _attention)

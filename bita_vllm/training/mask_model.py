"""The mask rows over a frozen base model: what is trained, and what drafts are measured with.

Ordinary tokens never see a mask row. So one pass without gradient over each sequence gives every
layer's keys and values (`context`), and then only the mask rows run (`mask_hidden`), reading
[prompt tokens | context up to their root | their own group]. Mask Mj of a group whose root stands
at position p sits at position p + j and predicts the token at position p + 1 + j.

    model = MaskModel.from_adapter(base, adapter_dir)
    context = model.context(input_ids)                       # [B, T]
    logits = model.mask_logits(context, roots)               # [B, G] -> [B, G, k, V]

Any transformers decoder whose attention goes through `AttentionInterface` will do; whether it does
is checked once, by computing a short text both ways.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.adapter.config import AdapterError, ModelShape
from bita_vllm.training.mask_attention import (
    ATTENTION_NAME,
    AttentionPass,
    ContextPass,
    MaskPass,
)
from bita_vllm.training.mask_lora import MaskLora

NUM_CHECKED_TOKENS = 8  # of the text by which a base model is tried


@dataclass(frozen=True)
class Context:
    """What ordinary tokens computed; no gradient."""

    keys: list[torch.Tensor]  # per layer [B, Hkv, T, D], as attention reads them
    values: list[torch.Tensor]  # per layer [B, Hkv, T, D]
    hidden: torch.Tensor  # [B, T, H], the output head's input: position p tells of token p + 1


class MaskModel(nn.Module):
    """Mask embeddings, prompt tokens and maybe low-rank deltas (all trainable, fp32 or the
    adapter's dtype) over a frozen base model, which this object takes over.

    Computation runs in the base model's dtype and on its device.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        mask_lora: MaskLora | None = None,
    ) -> None:
        """Raises AdapterError if the adapter is another model's or the base is not supported."""
        super().__init__()
        text_config = base.config.get_text_config()
        adapter.check(ModelShape.from_hf_config(text_config))
        base.requires_grad_(False).eval()
        self._base = [base]  # in a list: not a submodule, its weights are none of ours
        self._config = adapter.config
        device = base.get_input_embeddings().weight.device
        self.mask_embeddings = nn.Parameter(adapter.mask_embeddings.to(device, copy=True))
        self.prompt_keys = nn.Parameter(adapter.prompt_keys.to(device, copy=True))
        self.prompt_values = nn.Parameter(adapter.prompt_values.to(device, copy=True))
        self.dtype: torch.dtype = base.get_input_embeddings().weight.dtype
        self.lora: MaskLora | None = None
        self._logit_cap = getattr(text_config, "final_logit_softcapping", None)
        self._logit_factor = 1.0
        # Gemma scales token embeddings inside the embedding module, and vLLM the mask embeddings
        # with them (inside the wrapper of runner/embedding.py).
        self._embedding_scale = float(getattr(base.get_input_embeddings(), "embed_scale", 1.0))
        _take_over(self)
        if mask_lora is not None:
            self.add_lora(mask_lora)

    @classmethod
    def from_adapter(
        cls,
        base: PreTrainedModel,
        adapter: Adapter | str | Path,
        mask_lora: MaskLora | None = None,
    ) -> MaskModel:
        """The model with the weights of `adapter`, its low-rank deltas included unless others are
        given. Raises AdapterError."""
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter)
        if mask_lora is None and adapter.mask_lora is not None:
            mask_lora = MaskLora.from_weights(adapter.mask_lora, base)
        return cls(base, adapter, mask_lora)

    def add_lora(self, mask_lora: MaskLora) -> None:
        """Low-rank deltas for the mask rows, from now on."""
        self.lora = mask_lora.to(self.mask_embeddings.device)
        self.lora.attach(self.base)

    def adapter(self) -> Adapter:
        """The adapter as it stands, on the CPU."""
        tensors = {
            name: getattr(self, name).detach().cpu().clone()
            for name in ("mask_embeddings", "prompt_keys", "prompt_values")
        }
        mask_lora = None if self.lora is None else self.lora.weights(self.base)
        return Adapter(self._config, **tensors, mask_lora=mask_lora)

    @property
    def base(self) -> PreTrainedModel:
        return self._base[0]

    @property
    def num_masks(self) -> int:
        """k"""
        return len(self.mask_embeddings)

    @torch.no_grad()
    def context(
        self,
        # [B, T] token ids, right-padded with anything
        input_ids: torch.Tensor,
    ) -> Context:
        """One causal pass of the base model over ordinary tokens, which see nothing of ours."""
        recorder = ContextPass()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embeddings = self.base.get_input_embeddings()(input_ids)
        with self._without_lora():
            hidden = self._decode(embeddings, positions.expand(len(input_ids), -1), recorder)
        return Context(recorder.keys, recorder.values, hidden)

    def mask_hidden(
        self,
        context: Context,
        # [B, G] positions of the groups' roots in their sequences, in any order
        roots: torch.Tensor,
    ) -> torch.Tensor:
        """`[B, G, k, H]`: the output head's input at every mask row."""
        batch, num_groups = roots.shape
        k = self.num_masks
        roots, order = roots.sort(dim=1)
        place = torch.arange(1, k + 1, device=roots.device)
        positions = (roots[..., None] + place).flatten(1)  # [B, G*k]
        embeddings = self.mask_embeddings.to(self.dtype) * self._embedding_scale
        embeddings = embeddings.repeat(num_groups, 1).expand(batch, -1, -1)  # [B, G*k, H]
        hidden = self._decode(
            embeddings,
            positions,
            MaskPass(
                context.keys,
                context.values,
                self.prompt_keys.to(self.dtype),
                self.prompt_values.to(self.dtype),
                roots,
                k,
            ),
        )
        back = order.argsort(dim=1)[:, :, None, None]
        hidden = hidden.view(batch, num_groups, k, -1)
        return hidden.gather(1, back.expand(-1, -1, *hidden.shape[2:]))

    def logits(
        self,
        # [..., H] from `Context.hidden` or `mask_hidden`
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """`[..., V]` through the base model's output head."""
        logits = self.base.get_output_embeddings()(hidden)
        if self._logit_factor != 1.0:
            logits = logits * self._logit_factor
        if self._logit_cap is not None:
            logits = self._logit_cap * torch.tanh(logits / self._logit_cap)
        return logits

    def mask_logits(
        self,
        context: Context,
        # [B, G]
        roots: torch.Tensor,
    ) -> torch.Tensor:
        """`[B, G, k, V]`. Large: to work in chunks, take `mask_hidden` and `logits`."""
        return self.logits(self.mask_hidden(context, roots))

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward pass, and compute the rest again there."""
        for layer in decoder_layers(self.base):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def _decode(
        self,
        embeddings: torch.Tensor,  # [B, rows, H]
        positions: torch.Tensor,  # [B, rows]
        attention: AttentionPass,
    ) -> torch.Tensor:
        """Final hidden states `[B, rows, H]`."""
        output = self.base.base_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, bita_pass=attention
        )
        return output.last_hidden_state

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        if self.lora is None:
            yield
            return
        self.lora.enabled = False
        try:
            yield
        finally:
            self.lora.enabled = True


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises AdapterError if there is no such list."""
    num_layers = ModelShape.from_hf_config(base.config.get_text_config()).num_layers
    for module in base.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise AdapterError(
        f"{type(base).__name__} has no list of {num_layers} decoder layers, so bita cannot train "
        "an adapter for it."
    )


def _logit_factor(
    model: MaskModel,
    # [B, T, H]
    hidden: torch.Tensor,
    # [B, T, V]
    expected: torch.Tensor,
) -> float:
    """What the base multiplies its output head's logits with: 1, or what its config says (Granite, Command R)."""
    config = model.base.config.get_text_config()
    factors = [1.0]
    for name in ("logit_scale", "logits_scaling"):
        if scale := getattr(config, name, None):
            factors += [scale, 1 / scale]  # some multiply with it, some divide
    logits = model.logits(hidden)
    return min(factors, key=lambda factor: float((factor * logits - expected).norm()))


def _take_over(model: MaskModel) -> None:
    """Route the base's attention to ours, and check that it computes what it did before."""
    base = model.base
    if base.config._attn_implementation == ATTENTION_NAME:
        raise AdapterError("This base model carries another MaskModel already; load it once more.")
    # Ordinary tokens: over the special ones, with the first ids, bf16 rounds logits to 10% off.
    vocab_size = base.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocab_size - 1, NUM_CHECKED_TOKENS + 2).long()[None, 1:-1]
    ids = ids.to(model.mask_embeddings.device)
    problem = ""
    try:
        with torch.no_grad():
            base.set_attn_implementation("eager")  # the one that leaves nothing out (softcaps)
            expected = base(input_ids=ids, use_cache=False).logits
            base.set_attn_implementation(ATTENTION_NAME)
            context = model.context(ids)
            model._logit_factor = _logit_factor(model, context.hidden, expected)
            logits = model.logits(context.hidden)
        error = float((logits - expected).norm() / expected.norm())
        tolerance = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not error <= tolerance:
            problem = f"its logits come out {error:.1%} off"
        if len(context.keys) != model.prompt_keys.shape[0]:
            problem = (
                f"only {len(context.keys)} of its layers attend through transformers' interface"
            )
        if getattr(base.config.get_text_config(), "attention_chunk_size", None):
            problem = "it attends in chunks"  # which so short a text does not show
    except (ValueError, TypeError, AttributeError) as failure:
        problem = str(failure).strip().splitlines()[0]
    if problem:
        raise AdapterError(
            f"{type(base).__name__} is not supported by bita's training: {problem}; use a decoder "
            "whose attention and output head are transformers' standard ones."
        )

"""BiTA decoding written as plainly as possible: the specification the engine is compared against.

Plain transformers, no KV cache: each step recomputes the committed context and the step block in
one forward pass with an explicit mask. It shares no code with the plugin's templates, kernels or
runners; only the adapter's three tensors come from there. fp32 and fp64, models with full causal
attention (Llama and its like).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from bita_vllm.adapter.checkpoint import Adapter


@dataclass(frozen=True)
class Template:
    """A tree as four lists over its rows. Row 0 is the root; parents come before their children.

    A mask group is a chain of mask rows: the first hangs under its node, each further one under
    the mask before it.
    """

    parent: list[int]  # row of the parent, -1 for the root
    is_mask: list[bool]
    mask_index: list[int]  # place in its group from 0, -1 for nodes
    rank: list[int]  # which of its depth's candidates a node holds, -1 for root and masks

    def path(self, row: int) -> list[int]:
        """The row and its ancestors, root first."""
        return [] if row == -1 else [*self.path(self.parent[row]), row]

    def depth(self, row: int) -> int:
        return len(self.path(row)) - 1

    def node_of(self, row: int) -> int:
        """The node whose mask group the row belongs to; a node itself."""
        return self.node_of(self.parent[row]) if self.is_mask[row] else row

    def block(self, depth: int) -> list[int]:
        """The rows of a step with candidates for `depth` depths: those nodes and their groups."""
        rows = range(len(self.parent))
        return [row for row in rows if self.depth(self.node_of(row)) <= depth]

    def candidate_rows(self, stop: int) -> list[int]:
        """The mask rows that predict depths 1, 2, ... of the next block, if the walk stops there.

        Each depth is served by the nearest group above that reaches so far: the stop node's own,
        or what an ancestor's masks said about a position still ahead.
        """
        rows: list[int] = []
        while True:
            for shift, node in enumerate(reversed(self.path(stop))):
                index = len(rows) + shift
                found = [
                    row
                    for row, mask_index in enumerate(self.mask_index)
                    if mask_index == index and self.node_of(row) == node
                ]
                if found:
                    rows += found
                    break
            else:
                return rows


@dataclass(frozen=True)
class Step:
    rows: list[int]  # of the template, that the block held
    tokens: list[int]  # emitted: the accepted candidates and the base model's own next token


@dataclass(frozen=True)
class Decoded:
    tokens: list[int]  # all output, the first from prefill
    steps: list[Step]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    adapter: Adapter,
    template: Template,
    prompt: list[int],
    max_tokens: int,
    eos_ids: Collection[int] = (),
) -> Decoded:
    """Decode greedily with BiTA up to `max_tokens` or a token of `eos_ids`, itself emitted too."""
    with naive_attention(model):
        output: list[int] = [_prefill(model, prompt)]
        steps: list[Step] = []
        candidates: list[list[int]] = []  # per depth: tokens, best first
        while len(output) < max_tokens and output[-1] not in eos_ids:
            rows = template.block(len(candidates))
            tokens = {0: output[-1]}
            for row in rows[1:]:
                if not template.is_mask[row]:
                    tokens[row] = candidates[template.depth(row) - 1][template.rank[row]]
            logits = dict(
                zip(
                    rows,
                    block_logits(model, adapter, template, rows, prompt + output[:-1], tokens),
                    strict=True,
                )
            )

            stop, emitted = 0, []
            while True:
                target = int(logits[stop].argmax())  # of equal ones the first
                emitted.append(target)
                children = [
                    row for row in tokens if template.parent[row] == stop and tokens[row] == target
                ]
                if not children:
                    break
                stop = children[0]
            candidates = [
                logits[row].argsort(descending=True, stable=True)[: max(template.rank) + 1].tolist()
                for row in template.candidate_rows(stop)
            ]

            ends = [i + 1 for i, token in enumerate(emitted) if token in eos_ids]
            emitted = emitted[: min([*ends, max_tokens - len(output)])]
            output += emitted
            steps.append(Step(rows, emitted))
    return Decoded(output, steps)


def _prefill(model: PreTrainedModel, prompt: list[int]) -> int:
    """The token after `prompt`, from plain causal rows."""
    length = len(prompt)
    embeddings = model.get_input_embeddings()(torch.tensor(prompt))
    causal = torch.ones(length, length).tril().bool()
    logits = _forward(model, embeddings, torch.arange(length), causal, num_logits=1)
    return int(logits[0].argmax())


def block_logits(
    model: PreTrainedModel,
    adapter: Adapter,
    template: Template,
    rows: list[int],
    context: list[int],
    tokens: dict[int, int],
) -> torch.Tensor:
    """Logits [len(rows), vocab_size] of a block after the committed `context`.

    `tokens` maps each root or node row to its token. Needs the model under `naive_attention`.
    """
    start, total = len(context), len(context) + len(rows)
    place = {row: start + i for i, row in enumerate(rows)}
    embed = model.get_input_embeddings()
    embeddings = embed(torch.tensor(context + [tokens.get(row, 0) for row in rows]))
    positions = torch.arange(total)
    visible = torch.ones(total, total).tril().bool()  # [query, key]
    visible[start:, start:] = False
    is_mask = torch.zeros(total, dtype=torch.bool)
    for row in rows:
        at = place[row]
        positions[at] = start + template.depth(row)
        visible[at, [place[ancestor] for ancestor in template.path(row)]] = True
        if template.is_mask[row]:
            is_mask[at] = True
            embeddings[at] = adapter.mask_embeddings[template.mask_index[row]]
    return _forward(
        model,
        embeddings,
        positions,
        visible,
        num_logits=len(rows),
        prompt_keys=adapter.prompt_keys.to(embeddings),
        prompt_values=adapter.prompt_values.to(embeddings),
        is_mask=is_mask,
    )


def _forward(
    model: PreTrainedModel,
    embeddings: torch.Tensor,  # [num_rows, hidden_size]
    positions: torch.Tensor,  # [num_rows]
    visible: torch.Tensor,  # [num_rows, num_rows] bool
    num_logits: int,
    **prompt: torch.Tensor,
) -> torch.Tensor:
    """Logits [num_logits, vocab_size] of the last rows."""
    output = model(
        inputs_embeds=embeddings[None],
        position_ids=positions[None],
        attention_mask=visible[None, None],
        use_cache=False,
        logits_to_keep=num_logits,
        **prompt,
    )
    return output.logits[0]


def attention_with_prompt(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_rows, head_size], RoPE applied
    key: torch.Tensor,  # [1, num_kv_heads, num_rows, head_size], RoPE applied
    value: torch.Tensor,  # [1, num_kv_heads, num_rows, head_size]
    attention_mask: torch.Tensor,  # [1, 1, num_rows, num_rows] bool
    scaling: float,
    prompt_keys: torch.Tensor | None = None,  # [num_layers, num_prompt, num_kv_heads, head_size]
    prompt_values: torch.Tensor | None = None,  # like prompt_keys
    is_mask: torch.Tensor | None = None,  # [num_rows] bool
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Textbook attention, with the layer's prompt tokens in front for mask rows only."""
    if kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise NotImplementedError("The naive decoder has no sliding window and no softcap.")
    visible = attention_mask
    if prompt_keys is not None and prompt_values is not None and is_mask is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # modules type all attributes
        key = torch.cat([prompt_keys[layer].transpose(0, 1)[None], key], dim=2)
        value = torch.cat([prompt_values[layer].transpose(0, 1)[None], value], dim=2)
        sees_prompt = is_mask[:, None].expand(-1, prompt_keys.shape[1])
        visible = torch.cat([sees_prompt[None, None], visible], dim=3)
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("bita_naive", attention_with_prompt)


@contextmanager
def naive_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model's attention through `attention_with_prompt` inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("bita_naive")
    try:
        yield
    finally:
        model.set_attn_implementation(before)

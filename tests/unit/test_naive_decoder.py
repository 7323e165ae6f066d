"""The naive decoder is the reference for the engine; here it is held to plain decoding itself."""

from itertools import pairwise

import pytest
import torch
from naive_decoder import (
    Template,
    attention_with_prompt,
    block_logits,
    decode,
    naive_attention,
)
from transformers import LlamaConfig, LlamaForCausalLM

from bita_vllm.adapter.checkpoint import Adapter, random_adapter
from bita_vllm.adapter.config import ModelShape

LIKELY_TOKENS = 6  # few enough that a top-5 guess is often right


def make_model(dtype: torch.dtype, num_kv_heads: int = 2) -> LlamaForCausalLM:
    """A tiny random model whose next token is one of a few, so that random masks guess some."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        intermediate_size=128,
        vocab_size=300,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        model.lm_head.weight[LIKELY_TOKENS:] *= 0.01
    return model


def make_adapter(model: LlamaForCausalLM, num_mask: int = 3, num_prompt: int = 4) -> Adapter:
    return random_adapter(
        ModelShape.from_hf_config(model.config),
        num_mask,
        num_prompt,
        seed=1,
        embedding_std=0.3,
        prompt_std=1.0,
    )


def make_template(widths: list[int], group_sizes: dict[int, int] | int) -> Template:
    """An upper triangle of these widths; then the mask groups, of one size or by node row."""
    parent, is_mask, mask_index, rank = [-1], [False], [-1], [-1]
    best = 0
    for width in widths:
        above = best
        best = len(parent)
        for r in range(width):
            parent.append(above)
            rank.append(r)
    num_nodes = len(parent)
    is_mask, mask_index = [False] * num_nodes, [-1] * num_nodes
    for node in range(num_nodes):
        size = group_sizes if isinstance(group_sizes, int) else group_sizes.get(node, 0)
        for index in range(size):
            parent.append(node if index == 0 else len(parent) - 1)
            is_mask.append(True)
            mask_index.append(index)
            rank.append(-1)
    return Template(parent, is_mask, mask_index, rank)


TEMPLATES = {
    "root-only": make_template([], 0),
    "root-with-group": make_template([], 3),
    "chain": make_template([1, 1, 1], 3),
    "widths-5-4-3-all-groups": make_template([5, 4, 3], 3),
    "groups-missing": make_template([5, 4, 3], {0: 3, 1: 3}),
    "groups-short": make_template([5, 4], {0: 3, 1: 1, 2: 2, 6: 1}),
    "group-on-root-only": make_template([5, 4, 3], {0: 3}),
}

PROMPT = [17, 250, 3, 99, 42]


def plain_greedy(model: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_tokens,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_prompt", [0, 4], ids=["P0", "P4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_output_equals_plain_greedy_decoding(
    name: str, dtype: torch.dtype, num_prompt: int
) -> None:
    model = make_model(dtype)
    adapter = make_adapter(model, num_prompt=num_prompt)
    decoded = decode(model, adapter, TEMPLATES[name], PROMPT, max_tokens=40)
    assert decoded.tokens == plain_greedy(model, PROMPT, 40)
    assert decoded.tokens == decoded.tokens[:1] + [t for s in decoded.steps for t in s.tokens]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
def test_any_number_of_kv_heads(num_kv_heads: int) -> None:
    model = make_model(torch.float64, num_kv_heads)
    template = TEMPLATES["widths-5-4-3-all-groups"]
    decoded = decode(model, make_adapter(model), template, PROMPT, max_tokens=20)
    assert decoded.tokens == plain_greedy(model, PROMPT, 20)


@pytest.mark.parametrize("name", ["chain", "widths-5-4-3-all-groups", "group-on-root-only"])
def test_drafts_are_accepted(name: str) -> None:
    model = make_model(torch.float64)
    decoded = decode(model, make_adapter(model), TEMPLATES[name], PROMPT, max_tokens=100)
    assert sum(len(s.tokens) for s in decoded.steps) > len(decoded.steps)


def test_first_block_is_the_root_and_its_group() -> None:
    model = make_model(torch.float64)
    template = TEMPLATES["widths-5-4-3-all-groups"]
    steps = decode(model, make_adapter(model), template, PROMPT, max_tokens=10).steps
    assert steps[0].rows == [0, 13, 14, 15]
    assert steps[1].rows == list(range(52))


def test_stops_at_max_tokens_and_at_eos() -> None:
    model = make_model(torch.float64)
    adapter, template = make_adapter(model), TEMPLATES["widths-5-4-3-all-groups"]
    full = decode(model, adapter, template, PROMPT, max_tokens=40).tokens
    for max_tokens in range(1, 12):
        assert decode(model, adapter, template, PROMPT, max_tokens).tokens == full[:max_tokens]
    for eos in set(full):
        decoded = decode(model, adapter, template, PROMPT, max_tokens=40, eos_ids={eos})
        assert decoded.tokens == full[: full.index(eos) + 1]


def test_every_row_computes_what_its_path_alone_would() -> None:
    """Nodes and, with P = 0, masks: each equals the last row of a plain causal pass of its path."""
    model = make_model(torch.float64)
    adapter = make_adapter(model, num_prompt=0)
    template = TEMPLATES["groups-short"]
    rows = list(range(len(template.parent)))
    tokens = {row: 20 + row for row in rows if not template.is_mask[row]}
    with torch.no_grad():
        with naive_attention(model):
            logits = block_logits(model, adapter, template, rows, PROMPT, tokens)
        embed = model.get_input_embeddings()
        for row in rows:
            path = torch.stack(
                [
                    adapter.mask_embeddings[template.mask_index[at]].double()
                    if template.is_mask[at]
                    else embed(torch.tensor(tokens[at]))
                    for at in template.path(row)
                ]
            )
            inputs = torch.cat([embed(torch.tensor(PROMPT)), path])
            plain = model(inputs_embeds=inputs[None]).logits[0, -1]
            torch.testing.assert_close(logits[row], plain)


def test_only_mask_rows_see_the_prompt_tokens() -> None:
    model = make_model(torch.float64)
    template = TEMPLATES["widths-5-4-3-all-groups"]
    rows = list(range(len(template.parent)))
    tokens = {row: 20 + row for row in rows if not template.is_mask[row]}
    with torch.no_grad(), naive_attention(model):
        with_prompt, without = (
            block_logits(model, make_adapter(model, num_prompt=p), template, rows, PROMPT, tokens)
            for p in (4, 0)
        )
    differs = (with_prompt - without).abs().amax(dim=-1) > 1e-6
    assert differs.tolist() == template.is_mask


def test_prompt_tokens_enter_attention_as_stored() -> None:
    """A prompt token with key 0 and value 0 adds exp(0) to every softmax sum, and nothing else."""
    model = make_model(torch.float64)
    query = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    value = torch.ones(1, 2, 1, 16, dtype=torch.float64)
    output, _ = attention_with_prompt(
        model.model.layers[1].self_attn,
        query,
        torch.zeros_like(value),
        value,
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
        scaling=0.25,
        prompt_keys=torch.zeros(2, 3, 2, 16, dtype=torch.float64),
        prompt_values=torch.zeros(2, 3, 2, 16, dtype=torch.float64),
        is_mask=torch.tensor([True]),
    )
    torch.testing.assert_close(output, torch.full_like(output, 0.25))  # 1 / (1 + 3 prompt tokens)


@pytest.mark.parametrize(
    ("group_sizes", "stop", "expected"),
    [
        # Nodes of [1, 1]: rows 0, 1, 2; groups follow in the order of their nodes.
        ({0: 3, 1: 3, 2: 3}, 0, [3, 4, 5]),
        ({0: 3, 1: 3, 2: 3}, 2, [9, 10, 11]),
        ({0: 3}, 0, [3, 4, 5]),
        ({0: 3}, 1, [4, 5]),  # left over: the root's masks, one position on
        ({0: 3}, 2, [5]),
        ({0: 3, 1: 1}, 1, [6, 5]),  # own mask first, then the root's for what lies beyond
        ({0: 3, 1: 2}, 2, [7]),
        ({0: 3, 1: 1}, 2, [5]),  # the node between has too short a group
        ({1: 3}, 0, []),
        ({}, 2, []),
    ],
    ids=str,
)
def test_candidates_come_from_the_nearest_group_that_reaches(
    group_sizes: dict[int, int], stop: int, expected: list[int]
) -> None:
    assert make_template([1, 1], group_sizes).candidate_rows(stop) == expected


def test_left_over_candidates_are_tried_again() -> None:
    """With a group under the root only, a step that accepts leaves a shorter block, not none."""
    model = make_model(torch.float64)
    template = TEMPLATES["group-on-root-only"]
    steps = decode(model, make_adapter(model), template, PROMPT, max_tokens=100).steps
    for step, following in pairwise(steps):
        accepted = len(step.tokens) - 1
        assert following.rows == template.block(3 - accepted)
    assert {len(s.tokens) for s in steps} > {1}

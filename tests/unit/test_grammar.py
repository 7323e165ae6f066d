"""A node's bitmask is what vLLM's own manager gives after the node's path was really emitted."""

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bita_vllm.scheduling.grammar import BlockGrammar
from bita_vllm.step.block_drafts import BlockDrafts
from bita_vllm.tree import Template, TemplateTable

VOCAB_SIZE = 512
END_OF_REASONING = 90
TABLES = {
    "4-3-2": TemplateTable(Template.from_widths([4, 3, 2], 3)),
    "missing-groups": TemplateTable(
        Template.build([(0, 0), (0, 1), (1, 0), (3, 0), (2, 2)], {0: 3, 1: 1, 3: 2})
    ),
    "a-set": TemplateTable(Template.from_widths([2, 2], 2), Template.from_widths([1, 1], 3)),
}


class Reasoner:
    """Reasoning ends with one token; vLLM asks it as it asks its own parsers."""

    def __init__(self, tokenizer, **kwargs):
        del tokenizer, kwargs

    @staticmethod
    def is_reasoning_end(ids):
        return END_OF_REASONING in ids

    @staticmethod
    def is_reasoning_end_streaming(ids, delta):
        del ids
        return END_OF_REASONING in delta


@pytest.fixture(scope="module")
def vllm_config(tiny_model):
    return EngineArgs(
        str(tiny_model("llama", vocab_size=VOCAB_SIZE)), max_model_len=128, max_num_seqs=4
    ).create_engine_config()


def make_manager(vllm_config, reasons, monkeypatch):
    # rows of the bitmask, and how far a grammar can be rolled back
    monkeypatch.setattr(type(vllm_config), "num_speculative_tokens", property(lambda self: 60))
    manager = StructuredOutputManager(vllm_config)
    manager.reasoner_cls = Reasoner if reasons else None
    return manager


def make_request(manager, emitted=(), request_id="a"):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(ab|ac|b)(d|ef)*"))
    params.structured_outputs._backend = "xgrammar"
    params.update_from_tokenizer(manager.tokenizer)
    request = Request(request_id, [5, 6, 7], params, None)
    manager.grammar_init(request)
    request.structured_output_request._grammar = request.structured_output_request.grammar or (
        request.structured_output_request._grammar.result()
    )
    for token in emitted:
        request.append_output_token_ids(token)
        manager.accept_tokens(request, [token])
    return request


def block_of(table, line, rng, tokens):
    """Drafts of one request as a runner makes them, padded to the template's rows."""
    drafts = rng.choice(tokens, table.template.width)
    masks = table.mask_index[line, 1:]
    return np.where(masks >= 0, VOCAB_SIZE + masks, drafts).tolist()


@pytest.mark.parametrize("reasons", [False, True], ids=["", "reasoning"])
@pytest.mark.parametrize("name", TABLES)
def test_bitmask_of_a_node_is_that_of_its_path(vllm_config, monkeypatch, name, reasons):
    table, rng = TABLES[name], np.random.default_rng(0)
    manager = make_manager(vllm_config, reasons, monkeypatch)
    blocks = BlockGrammar(manager, table)
    encode = manager.tokenizer.encode
    # tokens that the grammar may take, the end of the output, one that it never takes
    tokens = [*encode("ab"), *encode("ac"), *encode("ef"), *map(encode, "abcdef"), 1, 70]
    tokens = [t if isinstance(t, int) else t[0] for t in tokens] + [END_OF_REASONING] * 3 * reasons
    reached = 0
    for trial in range(60):
        line = trial % len(table.num_rows)
        request = make_request(manager)
        drafts = block_of(table, line, rng, tokens)
        blocks.take_lines(BlockDrafts(["a"], [list(drafts)], [line]))
        kept = blocks.validate_tokens(request, list(drafts))
        assert kept == drafts
        cut = kept[: rng.integers(1, len(kept) + 1)] if trial % 3 == 2 else kept
        masks = blocks.grammar_bitmask({"a": request}, ["a"], {"a": cut}).copy()
        assert masks.shape == (table.max_nodes, VOCAB_SIZE // 32)
        for node in range(min(table.num_nodes[line], len(cut) + 1)):
            path = [node]
            while path[0] > 0:
                path.insert(0, int(table.parent[line, path[0]]))
            emitted = [drafts[row - 1] for row in path[1:]]
            if manager.validate_tokens(request, list(emitted)) != emitted:
                continue  # the walk cannot come here
            plain = make_request(manager, emitted, "plain")
            expected = manager.grammar_bitmask({"plain": plain}, ["plain"], {})
            assert (masks[node] == expected[0]).all(), (trial, node, emitted)
            reached += node > 0
    print(f"{reached} nodes below the root")
    assert reached > 20


def test_unknown_drafts_leave_the_root_only(vllm_config, monkeypatch):
    """Placeholders, or drafts that come without their line."""
    table = TABLES["missing-groups"]
    manager = make_manager(vllm_config, False, monkeypatch)
    blocks = BlockGrammar(manager, table)
    request = make_request(manager)
    blocks.take_lines(BlockDrafts(["a"], [[4, 5, 6, 7]], [len(table.num_rows) - 1]))
    assert blocks.validate_tokens(request, [4, 5, 6]) == [4, 5, 6]  # cut by the scheduler
    blocks.take_lines(DraftTokenIds(["a"], [[-1] * 10]))
    assert blocks.validate_tokens(request, [-1] * 10) == []
    assert blocks.validate_tokens(request, [4, 5, 6, 7]) == []
    masks = blocks.grammar_bitmask({"a": request}, ["a"], {"a": [-1] * 10}).copy()
    assert (masks[0] != -1).any() and (masks[1:] == -1).all()


def test_request_without_structure_is_left_alone(vllm_config, monkeypatch):
    manager = make_manager(vllm_config, False, monkeypatch)
    blocks = BlockGrammar(manager, TABLES["4-3-2"])
    request = Request("b", [5], SamplingParams(), None)
    assert blocks.validate_tokens(request, [-1, -1]) == [-1, -1]
    assert blocks.tokenizer is manager.tokenizer

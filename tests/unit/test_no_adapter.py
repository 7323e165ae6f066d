"""Without an adapter: options, rows and settings of runs whose drafts are copies alone."""

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from bita_vllm import plugin
from bita_vllm.scheduling import copy_rows
from bita_vllm.scheduling.default_rows import Machine
from bita_vllm.step.host import fill_blocks
from bita_vllm.step.settings import get_settings
from bita_vllm.system import platform
from bita_vllm.tree import NO_BLOCK
from bita_vllm.tree.chain_choice import ChainChoice
from bita_vllm.tree.copy_templates import copies_alone
from bita_vllm.tree.ladder import Ladder

plugin.register()


@pytest.fixture
def make(tiny_model):
    """Build the engine config of a run without an adapter."""

    def factory(options=None, **engine):
        engine = {"model": str(tiny_model("llama")), "max_model_len": 256, **engine}
        speculative = {"method": "bita", **(options or {})}
        return EngineArgs(**engine, speculative_config=speculative).create_engine_config()

    return factory


@pytest.mark.parametrize(
    "options", [{}, {"num_speculative_tokens": "auto", "tree": "auto", "copies": True}], ids=str
)
def test_rows_follow_the_load(make, options):
    settings = get_settings(make(options))
    assert (settings.adapter_dir, settings.source) == (None, "copies")
    assert settings.ladder.lookup(16)[1:].tolist() == [7, *[3] * 3, *[1] * 4, *[0] * 8]
    assert settings.row_share > 0
    for one in settings.ladder.template_sets:
        lengths = [template.num_copies for template in one.templates]
        assert lengths == list(range(one.first.width, 0, -1))
        assert all(t.num_rows == 1 + t.num_copies for t in one.templates)


def test_a_number_of_the_users_is_one_width_at_every_load(make):
    settings = get_settings(make({"num_speculative_tokens": 4}))
    assert set(settings.ladder.lookup(64)[1:]) == {4}
    assert settings.row_share == 0


@pytest.mark.parametrize("max_model_len", [4, 6])
def test_blocks_fit_in_a_sequence(make, max_model_len):
    settings = get_settings(make(max_model_len=max_model_len))
    assert 1 <= settings.num_speculative_tokens == max_model_len - 2


def test_flags_alone_ask_for_it(tiny_model):
    args = EngineArgs(
        str(tiny_model("llama")), spec_method="bita", spec_tokens=4, max_model_len=256
    )
    settings = get_settings(args.create_engine_config())
    assert (settings.source, settings.num_speculative_tokens) == ("copies", 4)


REFUSED = {
    "nothing drafts": ({"copies": False}, ["'copies' is false", "nothing else drafts"]),
    "not a yes or no": ({"copies": 7}, ["'copies' is 7", "true or false"]),
    "tree": ({"tree": "2,1"}, ["'tree' is '2,1'", "no adapter is named"]),
    "ladder": ({"ladder": "x.json"}, ["'ladder' is 'x.json'", "no adapter is named"]),
    "zero": ({"num_speculative_tokens": 0}, ["is 0", "1 to 15"]),
    "too many": ({"num_speculative_tokens": 16}, ["is 16", "1 to 15"]),
    "text": ({"num_speculative_tokens": "4"}, ["is '4'", "1 to 15"]),
}


@pytest.mark.parametrize(("options", "facts"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_is_refused_in_one_sentence(make, options, facts):
    with pytest.raises(ValueError) as error:
        make(options)
    message = str(error.value)
    assert "\n" not in message and all(fact in message for fact in facts), message


def test_a_gpu_needs_an_adapter_for_now(make, monkeypatch):
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    with pytest.raises(ValueError, match="needs an adapter on a GPU for now: give its directory"):
        make()


def test_the_form_without_blocks_is_compiled_alike_with_every_adapter_and_with_none(make):
    """What is compiled for it holds nothing of an adapter; packed layers it does hold."""
    spec = make().speculative_config
    hashes = []
    for num_mask_tokens in (0, 3):
        for traces_blocks in (False, True):
            object.__setattr__(spec.bita, "num_mask_tokens", num_mask_tokens)
            spec.traces_blocks = traces_blocks
            hashes.append(spec.compute_hash())
    assert hashes[0] == hashes[2] and len(set(hashes)) == 3


def chosen(row_share, width, chances):
    """Lengths of the blocks that a step with these requests gets."""
    sets = copies_alone([3, 8])
    ladder = Ladder(sets, [(1, 1, 7)])
    index = ladder.widths.index(width)
    chance = torch.zeros(len(chances), 15, 1)
    for i, each in enumerate(chances):
        chance[i, : len(each), 0] = torch.tensor(each)
    lines = ChainChoice(ladder, row_share)(index, torch.zeros(len(chances)), chance).numpy()
    drafts = fill_blocks(ladder.table, lines, np.arange(len(chances) * 15).reshape(-1, 15, 1), 99)
    for i, own in enumerate(drafts):
        assert own == list(range(15 * i, 15 * i + len(own)))
        assert (lines[i] == NO_BLOCK) == (not own)
    return [len(own) for own in drafts]


def test_a_request_without_a_match_has_no_block():
    assert chosen(0.0, 7, [[], [0.01] * 15, []]) == [0, 7, 0]
    assert chosen(0.2, 2, [[], [0.9] * 15]) == [0, 2]


def test_a_copied_token_is_worth_its_row_or_is_not_tried():
    # reached: 0.5, 0.25, 0.125 ...; a row costs 0.2 of a step of one row
    assert chosen(0.2, 7, [[0.5] * 15]) == [2]
    # Two requests: a plain step takes 1.2, so a token 0.6, and a row 0.2 of that 0.6.
    assert chosen(0.2, 7, [[0.5] * 15, [0.3] * 15]) == [1, 0]
    assert chosen(0.2, 7, [[0.75] * 15, [1.0] * 15]) == [3, 7]


def test_rows_are_dearer_where_vllms_own_layers_multiply():
    shares = [
        copy_rows.copy_ladder({}, Machine(on_gpu=False, packs_linear_layers=packs))[1]
        for packs in (True, False)
    ]
    assert 0 < shares[0] < shares[1] < 1

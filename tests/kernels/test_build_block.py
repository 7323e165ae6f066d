"""Next blocks on the device against the CPU runner's (`LineChoice`, `fill_blocks`), and the naive twins."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from bita_kernels import rank_tokens as module
from bita_kernels.build_block import PADDING_TOKEN, build_block
from bita_kernels.build_block_naive import build_block_naive
from bita_kernels.candidates import Candidates
from bita_kernels.choice_table import ChoiceTable
from bita_kernels.rank_tokens import Ranking, rank_tokens
from bita_kernels.rank_tokens_naive import rank_tokens_naive
from bita_kernels.tree_table import TreeTable
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_trees import int32, templates
from tree_tools import ladder_of, probabilities_of, sets_of_one

from bita_vllm.step.host import ChosenMasks, fill_blocks
from bita_vllm.tree import Template, TemplateTable
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.template_set import TemplateSet

POISON = -7
COPIED = 5000
ACCEPTANCE = acceptance_table(None, 5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 16 tokens: small vocabularies take several."""
    monkeypatch.setattr(module, "CHUNK", 16)


def distinct_logits(generator, num_rows, vocab_size, dtype):
    """Rows of distinct finite values of that dtype, both signs, in random order."""
    values = torch.arange(vocab_size, dtype=torch.float32) - vocab_size // 2
    order = np.stack([generator.permutation(vocab_size) for _ in range(num_rows)])
    return values[torch.from_numpy(order)].to(dtype)


def device_choice(sets):
    """The table of all lines, and the choice among them."""
    ladder = ladder_of(sets)
    table = TreeTable.of(ladder.table, "cpu")
    choice = LineChoice(ladder, ACCEPTANCE, torch.device("cpu"))
    return table, ChoiceTable.of(choice, table.num_ranks, "cpu")


def arguments(sets, logits, logits_rows, depths, token_dtype=torch.int64, **others):
    """Inputs, of more depths than the table has; scratch memory and outputs full of poison."""
    table, choice = device_choice(sets)
    sizes = choice.mask_depth, table.max_rank, "cpu"
    ranking = Ranking.of(len(depths) + 1, logits.shape[1], *sizes)
    ranking.keys.fill_(2**63 - 1)
    ranking.log_sums.fill_(torch.nan)
    candidates = Candidates.empty(len(depths), table.max_depth + 1, table.num_ranks, "cpu")
    candidates = replace(candidates, depths=int32(np.array(depths)))
    candidates.tokens.fill_(POISON)
    candidates.chance.fill_(torch.nan)
    if table.has_copies:
        tokens, chances = copies_of(len(depths), table.max_depth + 1)
        candidates.tokens[..., -1], candidates.chance[..., -1] = tokens, chances
    return {
        "logits": logits,
        "logits_rows": torch.from_numpy(np.ascontiguousarray(logits_rows)),
        "candidates": candidates,
        "slots": torch.arange(len(depths)).flip(0),
        "first_mask_id": 1000,
        "table": table,
        "choice": choice,
        "set_index": 0,
        "ranking": ranking,
        "draft_tokens": torch.full((len(depths), table.num_rows - 1), POISON, dtype=token_dtype),
        "line_of_slot": torch.full((len(depths) + 1,), POISON, dtype=torch.int32),
        **others,
    }


def copies_of(num_requests, num_depths):
    """`[B, depths]` tokens and chances of made-up copies; the last request has none."""
    tokens = COPIED + torch.arange(num_requests * num_depths).view(num_requests, num_depths)
    chances = torch.rand(num_requests, num_depths, generator=torch.Generator().manual_seed(0))
    chances[-1] = 0
    return tokens, chances.sqrt()


def beside_copies(of_masks, copied, table):
    """`[B, max_depth, ranks of the table]`: values of masks `[B, depths, ranks]`, and of copies `[B, depths]`."""
    joint = torch.zeros(len(of_masks), table.max_depth, table.num_ranks, dtype=copied.dtype)
    joint[:, : of_masks.shape[1], : of_masks.shape[2]] = of_masks
    if table.has_copies:
        joint[..., -1] = copied[:, : table.max_depth]
    return joint


def one_tree(template):
    return sets_of_one([template])


def next_block(rank, build, *, logits, logits_rows, ranking, candidates, table, choice, **others):
    """Masks as candidates, and the block of them; without logits there are none."""
    if logits is None:
        candidates = candidates.none()
    else:
        most_depths = choice.mask_depths[others["set_index"]]
        chances = max(choice.num_templates) > 1
        of_masks = candidates.within(choice.mask_depth, slice(table.max_rank))
        logits_rows = logits_rows[:, : choice.mask_depth]
        rank(logits, logits_rows, most_depths, chances, ranking, of_masks)
        assert not ranking.arrived.any(), "the next launch counts from 0"
    build(candidates=candidates, table=table, choice=choice, **others)


kernels = partial(next_block, rank_tokens, build_block)
twins = partial(next_block, rank_tokens_naive, build_block_naive)
BOTH = {"kernels": kernels, "twins": twins}


@given(
    template=templates(),
    num_requests=st.integers(1, 3),
    vocab_size=st.integers(6, 40),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    token_dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=80, deadline=None)
def test_blocks_equal_those_of_the_cpu_runner(
    template, num_requests, vocab_size, seed, dtype, token_dtype
):
    assume(template.max_depth <= ACCEPTANCE.shape[2])  # `Ladder.check` refuses others
    generator = np.random.default_rng(seed)
    table = TemplateTable(template)
    line = generator.integers(0, template.mask_depth + 1, num_requests)
    logits = distinct_logits(generator, 9, vocab_size, dtype)
    has = np.arange(template.mask_depth) < line[:, None]
    logits_rows = np.where(has, generator.integers(0, 9, has.shape), 10**6)
    best = logits[logits_rows[has]].float().topk(template.max_rank).indices.numpy()
    masks = ChosenMasks(depths=line, rows=np.where(has, logits_rows, -1))
    for name, function in BOTH.items():
        given_ = arguments(one_tree(template), logits, logits_rows, line, token_dtype)
        copied, _ = copies_of(num_requests, template.max_depth + 1)
        tokens = beside_copies(torch.from_numpy(masks.by_depth(best)), copied, given_["table"])
        want = padded(fill_blocks(table, line, tokens.numpy(), 1000), template.num_rows)
        function(**given_)
        assert given_["draft_tokens"].tolist() == want, name
        assert given_["line_of_slot"].tolist() == [*line[::-1], POISON]


def padded(blocks, num_rows):
    return [block + [PADDING_TOKEN] * (num_rows - 1 - len(block)) for block in blocks]


SETS = (
    TemplateSet(
        (
            Template.build([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)], {0: 3, 1: 1}),
            Template.build([(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)], {0: 3, 3: 1}),
            Template.build([(0, 0)], {0: 3, 1: 3}),
        )
    ),
    TemplateSet(
        (
            Template.from_widths([3, 2], 3),
            Template.build([(0, 0), (0, 1), (2, 0), (2, 1), (1, 0)], {0: 3}),
        )
    ),
)


WITH_COPIES = (
    TemplateSet(
        (
            *SETS[0].templates,
            Template.build([], {0: 2}, copies=6),
            Template.build([(0, 0)], {0: 2, 3: 2}, copies=3),
            Template.build([(0, 0), (0, 1), (1, 0), (3, 0)], {0: 3}, copies=2),
        )
    ),
    SETS[1],
)


@pytest.mark.parametrize("set_index", [0, 1])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sets", [SETS, WITH_COPIES], ids=["masks", "copies"])
def test_trees_are_those_that_the_cpu_runner_chooses(sets, seed, set_index):
    generator = np.random.default_rng(seed)
    ladder = ladder_of(sets)
    table, choice = ladder.table, LineChoice(ladder, ACCEPTANCE, torch.device("cpu"))
    num_requests, mask_depth = 8, int(table.mask_depths.max())
    depths = generator.integers(0, mask_depth + 1, num_requests)
    # Flat and steep distributions, in several chunks, so that every tree has its turn.
    logits = distinct_logits(generator, 40, 37, torch.float32)
    logits *= torch.from_numpy(generator.uniform(0.01, 1.5, (40, 1))).float()
    has = np.arange(mask_depth) < depths[:, None]
    logits_rows = np.where(has, generator.integers(0, 40, has.shape), 10**6)
    own = logits[np.where(has, logits_rows, 0)]  # [B, depths, V]
    top = own.topk(table.max_rank, dim=-1)
    on_device = device_choice(sets)[0]
    tokens, chances = (
        beside_copies(of_masks, copied, on_device)
        for of_masks, copied in zip(
            (top.indices, probabilities_of(top.values, own)),
            copies_of(num_requests, table.max_depth + 1),
            strict=True,
        )
    )
    line = choice(set_index, torch.from_numpy(depths), chances).numpy()
    want = padded(fill_blocks(table, line, tokens.numpy(), 1000), table.template.num_rows)
    for name, function in BOTH.items():
        given_ = arguments(sets, logits, logits_rows, depths, set_index=set_index)
        function(**given_)
        assert given_["line_of_slot"].tolist() == [*line[::-1], POISON], name
        assert given_["draft_tokens"].tolist() == want, name
    print(f"trees {np.bincount(table.template_of(line), minlength=8).tolist()}")


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_copies_are_drafted_where_masks_have_no_candidates(function):
    given_ = arguments(WITH_COPIES, torch.zeros(1, 37), np.full((2, 3), 10**6), [0, 0])
    function(**given_)
    table = ladder_of(WITH_COPIES).table
    without, with_copies = given_["line_of_slot"][:2].tolist()  # slots are in reverse order
    copied = int(table.num_nodes[with_copies]) - 1
    assert copied >= 3 and table.num_nodes[without] == 1
    assert given_["draft_tokens"][0, :copied].tolist() == list(range(COPIED, COPIED + copied))


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_without_candidates_every_block_is_the_first_trees_own(function):
    given_ = arguments(SETS, torch.zeros(1, 20), np.full((3, 3), 10**6), [2, 3, 1], set_index=1)
    function(**{**given_, "logits": None})
    table = ladder_of(SETS).table
    line = int(table.first_line[len(SETS[0].templates)])
    assert given_["line_of_slot"].tolist() == [line, line, line, POISON]
    masks = [1000 + index if index >= 0 else PADDING_TOKEN for index in table.mask_index[line, 1:]]
    assert given_["draft_tokens"].tolist() == [masks] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_still_choose_a_tree_of_the_set(bad):
    logits = torch.full((1, 40), bad)
    given_ = arguments(SETS, logits, np.zeros((2, 3), dtype=int), [3, 1])
    kernels(**given_)
    table = ladder_of(SETS).table
    deepest = np.minimum(table.mask_depths[:3], [[1], [3]])  # slots are in reverse order
    for line, allowed in zip(
        given_["line_of_slot"].tolist(), table.first_line[:3] + deepest, strict=False
    ):
        assert line in allowed.tolist()
    assert (given_["draft_tokens"] >= 0).all() and (given_["draft_tokens"] < 1003).all()


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-7]


@given(
    row=st.lists(st.sampled_from(SPECIAL), min_size=6, max_size=40),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_equal_logits_go_to_the_lower_id_and_nan_is_the_greatest(row, dtype):
    logits = torch.tensor([row]).to(dtype)
    given_ = arguments(one_tree(Template.from_widths([6], 1)), logits, np.array([[0]]), [1])
    kernels(**given_)
    got = given_["draft_tokens"][0, :6].tolist()

    def order(token):
        value = float(logits[0, token])
        return (value == value, -value if value == value else 0.0, token)

    assert got == sorted(range(len(row)), key=order)[:6]
    twins(**given_)
    assert given_["draft_tokens"][0, :6].tolist() == got
    # torch.topk: the same values; which of equal ones it returns is its own affair
    values = logits[0][got].nan_to_num(nan=9e9)
    assert torch.equal(values, logits.topk(6).values[0].nan_to_num(nan=9e9))


def test_a_chunk_of_real_size_and_sixteen_ranks(monkeypatch):
    monkeypatch.undo()
    template = Template.from_widths([16, 2], 2)
    table = TemplateTable(template)
    logits = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0))
    given_ = arguments(one_tree(template), logits, np.array([[1, 0]]), [2])
    assert given_["ranking"].keys.shape == (4, 3, 16)
    kernels(**given_)
    got = given_["draft_tokens"][0].tolist()
    best = logits.topk(16).indices
    depth, rank = table.depth[2], table.rank[2]
    nodes = range(1, int(table.num_nodes[2]))
    assert [got[row - 1] for row in nodes] == [
        int(best[1 if depth[row] == 1 else 0, rank[row]]) for row in nodes
    ]


def test_logits_rows_may_be_strided():
    wide = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    given_ = arguments(one_tree(Template.from_widths([3], 1)), wide[:, :50], np.array([[3]]), [1])
    kernels(**given_)
    assert given_["draft_tokens"][0, :3].tolist() == wide[3, :50].topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", lambda t: t.double(), "logits has dtype torch.float64, expected torch.float32 or"),
        ("logits", lambda t: t.T.contiguous().T, r"logits has strides \[1, 4\], expected 1 in the last"),
        ("logits", lambda t: t[:, :2], "logits has 2 tokens, expected at least 3"),
        ("candidates", lambda c: replace(c, depths=c.depths.long()), "depths has dtype torch.int64"),
        ("candidates", lambda c: replace(c, chance=c.chance[:1]), r"chance has shape \[1, 2, 3\], expected"),
        ("slots", lambda t: t.int(), "slots has dtype torch.int32, expected torch.int64"),
        ("logits_rows", lambda t: t[:, :1], r"logits_rows has shape \[2, 1\], expected \[2, 2\]"),
        ("ranking", lambda r: replace(r, keys=r.keys[:3]), "ranking.keys has 3 rows, expected at least 4"),
        ("ranking", lambda r: replace(r, keys=r.keys[:, 1:].contiguous()), r"keys has shape \[6, 1, 3\]"),
        ("draft_tokens", lambda t: t.float(), "draft_tokens has dtype torch.float32, expected torch.int32"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_the_launch(name, change, message):
    template = Template.from_widths([3, 2], 2)
    given_ = arguments(one_tree(template), torch.zeros(4, 20), np.zeros((2, 2), dtype=int), [2, 1])
    changed = {**given_, name: change(given_[name])}
    with pytest.raises(ValueError, match=message):
        kernels(**changed)
    assert (given_["draft_tokens"] == POISON).all()


def test_more_than_sixteen_ranks_are_refused():
    template = Template.from_widths([17], 1)
    given_ = arguments(one_tree(template), torch.zeros(1, 20), np.zeros((1, 1), dtype=int), [1])
    with pytest.raises(ValueError, match="candidates have 17 ranks, expected at most 16"):
        kernels(**given_)

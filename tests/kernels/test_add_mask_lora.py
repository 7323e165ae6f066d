"""`add_mask_lora` against its naive twin in float64, and the twin against the definition."""

import random
from functools import partial

import pytest
import torch
from bita_kernels import add_mask_lora as module
from bita_kernels import add_mask_lora_kernel as kernel_module
from bita_kernels.add_mask_lora import (
    MAX_LOW,
    MAX_ROW_PROGRAMS,
    MAX_SPLITS,
    ROW_TILE,
    add_mask_lora,
    choose_tiles,
    make_arrivals,
)
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from triton.runtime.interpreter import GridExecutor, interpreter_builder

# name -> (rows of the step, mask rows, input features, rank, (first, end) of each part, output features)
CASES = {
    "one part": (16, range(5, 16), 96, 8, [(0, 80)], 80),
    "q, k, v of unequal size": (32, [*range(5, 16), *range(21, 32)], 64, 4, [(0, 96), (96, 128), (128, 160)], 160),
    "q and v, not k": (16, range(4, 16), 64, 16, [(0, 96), (128, 160)], 160),
    "nothing round": (13, [2, 3, 11], 75, 5, [(0, 33), (33, 50)], 50),
    "several splits and steps": (20, range(7, 20), 1100, 3, [(0, 40)], 40),
    "several tiles of columns": (9, range(3, 9), 40, 2, [(0, 130), (130, 400)], 400),
    "rank above a step": (8, range(2, 8), 48, 72, [(0, 48), (48, 64)], 64),
    "more row tiles than programs": (300, range(1, 300), 24, 2, [(0, 20)], 20),
    "one mask row": (1, [0], 16, 1, [(0, 16)], 16),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(case, dtype=torch.float32, capacity=None, seed=0):
    """Arguments of add_mask_lora; after the mask rows lie rows that must not be read."""
    num_rows, mask_rows, inputs, rank, parts, outputs = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    mask_rows = torch.tensor(list(mask_rows))
    rows = torch.full((capacity or num_rows + 3,), 10**6)
    rows[: len(mask_rows)] = mask_rows
    return (
        random(num_rows, outputs),
        random(num_rows, inputs),
        random(len(parts) * rank, inputs) / inputs**0.5,
        random(outputs, rank) / rank**0.5,
        torch.tensor(parts, dtype=torch.int32),
        rows,
        torch.tensor([len(mask_rows)]),
        make_arrivals(len(rows), torch.device("cpu")),
    )


def expected(arguments):
    """The naive twin's output, in float64."""
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    add_mask_lora_naive(*wide)
    return wide[0]


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("case", CASES)
def test_naive_twin_is_the_definition(case):
    output, x, a, b, parts, rows, num, arrivals = make(case, torch.float64)
    want, rank = output.clone(), b.shape[1]
    for row in rows[: int(num)].tolist():
        for part, (first, end) in enumerate(parts.tolist()):
            own = slice(part * rank, (part + 1) * rank)
            want[row, first:end] += b[first:end] @ a[own] @ x[row]
    add_mask_lora_naive(output, x, a, b, parts, rows, num, arrivals)
    torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_twin(case, dtype):
    arguments = make(case, dtype)
    before, want = arguments[0].clone(), expected(arguments)
    add_mask_lora(*arguments)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(arguments[0].double(), want, rtol=tolerance, atol=tolerance)
    changed = (arguments[0] != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == arguments[5][: int(arguments[6])].tolist()
    assert not arguments[7].any(), "the counts are not zero for the next launch"


def test_ordinary_rows_and_other_columns_keep_their_bits():
    """Even where they hold NaN, and x holds NaN."""
    arguments = make("q and v, not k")
    output, x, rows = arguments[0], arguments[1], arguments[5][: int(arguments[6])]
    ordinary = torch.ones(len(output), dtype=torch.bool)
    ordinary[rows] = False
    output[ordinary], x[ordinary] = float("nan"), float("nan")
    before = output.clone()
    add_mask_lora(*arguments)
    assert torch.equal(output[ordinary].view(torch.int32), before[ordinary].view(torch.int32))
    assert torch.equal(output[:, 96:128].view(torch.int32), before[:, 96:128].view(torch.int32))
    assert output[rows].isfinite().all() and not torch.equal(output[rows], before[rows])


def test_a_row_has_the_same_bits_in_any_company():
    """In other tiles, with more or fewer rows than programs side by side (the interpreter multiplies
    with BLAS, where the place within a tile may matter: it stays)."""
    assert CASES["more row tiles than programs"][0] > MAX_ROW_PROGRAMS * ROW_TILE
    output, *rest, rows, num, arrivals = make("more row tiles than programs")
    together = output.clone()
    add_mask_lora(together, *rest, rows, num, arrivals)
    place = rows.tolist().index(140)
    for before in (place % ROW_TILE, place % ROW_TILE + ROW_TILE):
        company = torch.tensor([*range(1, 1 + before), 140, 150])
        among_few = output.clone()
        add_mask_lora(among_few, *rest, company, torch.tensor([len(company)]), arrivals)
        assert torch.equal(among_few[140], together[140])


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_one_launch(case, monkeypatch):
    launches, call = [], GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: launches.append(self) or call(self, *a, **k)
    )
    add_mask_lora(*make(case))
    assert len(launches) == 1


@pytest.mark.parametrize("seed", range(3))
def test_programs_may_start_in_any_order(seed, monkeypatch):
    """CUDA promises no order: work goes by tickets, so nobody waits for a program that did not start."""
    arguments = make("q, k, v of unequal size")
    together = arguments[0].clone()
    add_mask_lora(together, *arguments[1:])
    tiles = choose_tiles(64, 4, 4)
    num_shrink = -(-32 // ROW_TILE) * -(-12 // tiles.low)
    num_programs = 2 * (-(-160 // tiles.out) + 2) + num_shrink + 1
    order = list(range(num_programs))
    random.Random(seed).shuffle(order)
    place, started = interpreter_builder.set_grid_idx, []
    monkeypatch.setattr(
        interpreter_builder,
        "set_grid_idx",
        lambda x, y, z: started.append(x) or place(order[x], y, z),
    )
    add_mask_lora(*arguments)
    assert started == sorted(order)
    assert torch.equal(arguments[0], together) and not arguments[7].any()


@pytest.mark.parametrize("case", CASES)
def test_the_last_program_waits_for_all_that_read_the_arrivals(case, monkeypatch):
    """Who sets the arrivals back before another program has read them leaves it waiting for ever."""
    *tensors, arrivals = make(case)
    close, seen = kernel_module._close, []

    def record(arrived_ptr, passed_ptr, num_tiles, awaited):
        seen.append((arrivals[1, : int(num_tiles.handle.data[0])].tolist(), awaited))
        close(arrived_ptr, passed_ptr, num_tiles, awaited)

    monkeypatch.setattr(kernel_module, "_close", record)
    add_mask_lora(*tensors, arrivals)
    ((passed, awaited),) = seen
    # The interpreter runs the last program last: all others have passed.
    assert passed and passed == [int(awaited.handle.data[0])] * len(passed)


def test_no_mask_rows_change_nothing():
    output, *rest, num, arrivals = make("one part")
    before = output.clone()
    add_mask_lora(output, *rest, torch.zeros_like(num), arrivals)
    assert torch.equal(output, before)


def test_rows_of_an_earlier_larger_step_are_not_touched():
    """vLLM's dummy steps run with what the buffers held: more rows than there are, or after the end."""
    output, x, *rest = make("one part")
    before = output.clone()
    add_mask_lora(output[:4], x[:4], *rest)
    assert torch.equal(output, before)


def test_strided_rows():
    arguments = list(make("one part"))
    want = expected(arguments)
    wide_out, wide_x = torch.zeros(16, 100), torch.zeros(16, 130)
    wide_out[:, 7:87], wide_x[:, 3:99] = arguments[0], arguments[1]
    arguments[:2] = wide_out[:, 7:87], wide_x[:, 3:99]
    add_mask_lora(*arguments)
    torch.testing.assert_close(arguments[0].double(), want, rtol=1e-5, atol=1e-5)
    assert not wide_out[:, :7].any() and not wide_out[:, 87:].any()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.double(), "output has dtype torch.float64, expected one of torch.float32"),
        (0, lambda t: t[:, ::2], r"output has strides \[80, 2\], expected 1 in the last"),
        (1, lambda t: t[:3], r"x has shape \[3, 96\], expected \[16, any\]"),
        (2, lambda t: t[:3], r"lora_a has shape \[3, 96\], expected \[8, 96\]"),
        (3, lambda t: t[:3], r"lora_b has shape \[3, 8\], expected \[80, any\]"),
        (3, lambda t: t.half(), "lora_b has dtype torch.float16, expected torch.float32"),
        (4, lambda t: t.long(), "parts has dtype torch.int64, expected torch.int32"),
        (5, lambda t: t.int(), "mask_rows has dtype torch.int32, expected torch.int64"),
        (6, lambda t: t.to("meta"), "num_mask_rows is on meta, expected cpu"),
        (
            7,
            lambda t: t[:, :0].contiguous(),
            "arrivals has room for 0 row tiles, expected at least 1",
        ),
        (7, lambda t: t[0], r"arrivals has shape \[\d+\], expected \[3, any\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_launch(place, change, message):
    arguments = list(make("one part"))
    before = arguments[0].clone()
    output = arguments[0]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        add_mask_lora(*arguments)
    assert torch.equal(output, before)


def test_shipped_covers_every_dtype_and_the_usual_ranks():
    names = [configuration.name for configuration in module.shipped()]
    assert len(names) == len(set(names))
    for dtype in ("bf16", "fp16", "fp32"):
        assert {f"{dtype} rank {rank}" for rank in (16, 64, 128)} <= {
            n.split(",")[0] for n in names
        }


@pytest.mark.parametrize("rank", [1, 16, 64, 128, 512])
@pytest.mark.parametrize("in_features", [64, 576, 4096, 14336, 28672, 53248])
def test_tiles_hold_every_feature_in_few_splits(in_features, rank):
    for element_size in (2, 4):
        tiles = choose_tiles(in_features, rank, element_size)
        num_splits = -(-in_features // tiles.split)
        assert num_splits <= MAX_SPLITS and num_splits * tiles.rank <= MAX_LOW
        assert tiles.split % tiles.step == 0 and tiles.rank >= rank and tiles.rows == ROW_TILE


@pytest.mark.parametrize(
    ("num_masks", "num_ordinary"), [(11, 5), (88, 40), (352, 160), (0, 16), (11, 8181)]
)
def test_programs_of_a_launch_follow_from_its_shapes(num_masks, num_ordinary, monkeypatch):
    """One for each tile of A, one for each tile of B, in up to MAX_ROW_PROGRAMS rows, and the last."""
    grids = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: grids.append(self.grid))
    num_rows, inputs, outputs, rank = num_masks + num_ordinary, 4096, 28672, 16
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(module, "check_device", lambda *a: None)
    meta = torch.device("meta")
    add_mask_lora(
        empty(num_rows, outputs),
        empty(num_rows, inputs),
        empty(2 * rank, inputs),
        empty(outputs, rank),
        torch.empty(2, 2, dtype=torch.int32, device=meta),
        torch.empty(num_rows + 1, dtype=torch.int64, device=meta),
        torch.empty(1, dtype=torch.int64, device=meta),
        make_arrivals(num_rows + 1, meta),
    )
    row_programs = min(-(-num_rows // ROW_TILE), MAX_ROW_PROGRAMS)
    shrink, expand = 2 * 8, 28672 // 256 + 1
    assert grids == [(row_programs * (shrink + expand) + 1,)]

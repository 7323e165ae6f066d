"""`add_mask_lora` against its naive twin in float64, and the twin against the definition."""

import pytest
import torch
from bita_kernels import add_mask_lora as module
from bita_kernels.add_mask_lora import MAX_ROW_PROGRAMS, TILES, add_mask_lora
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive

# name -> (rows of the step, mask rows, input features, rank, (first, end) of each part, output features)
CASES = {
    "one part": (16, range(5, 16), 96, 8, [(0, 80)], 80),
    "q, k, v of unequal size": (32, [*range(5, 16), *range(21, 32)], 64, 4, [(0, 96), (96, 128), (128, 160)], 160),
    "q and v, not k": (16, range(4, 16), 64, 16, [(0, 96), (128, 160)], 160),
    "nothing round": (13, [2, 3, 11], 75, 5, [(0, 33), (33, 50)], 50),
    "several splits and steps": (20, range(7, 20), 1100, 3, [(0, 40)], 40),
    "several tiles of columns": (9, range(3, 9), 40, 2, [(0, 130), (130, 400)], 400),
    "rank above a step": (8, range(2, 8), 48, 72, [(0, 48), (48, 64)], 64),
    "more row tiles than programs": (170, range(1, 170), 24, 2, [(0, 20)], 20),
    "one mask row": (1, [0], 16, 1, [(0, 16)], 16),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(case, dtype=torch.float32, capacity=None, seed=0):
    """Arguments of add_mask_lora; behind the mask rows lie rows that must not be read."""
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
    output, x, a, b, parts, rows, num = make(case, torch.float64)
    want, rank = output.clone(), b.shape[1]
    for row in rows[: int(num)].tolist():
        for part, (first, end) in enumerate(parts.tolist()):
            own = slice(part * rank, (part + 1) * rank)
            want[row, first:end] += b[first:end] @ a[own] @ x[row]
    add_mask_lora_naive(output, x, a, b, parts, rows, num)
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
    assert CASES["more row tiles than programs"][0] > MAX_ROW_PROGRAMS * TILES.rows
    output, *rest, rows, num = make("more row tiles than programs")
    together = output.clone()
    add_mask_lora(together, *rest, rows, num)
    place = rows.tolist().index(140)
    for before in (place % TILES.rows, place % TILES.rows + TILES.rows):
        company = torch.tensor([*range(1, 1 + before), 140, 150])
        among_few = output.clone()
        add_mask_lora(among_few, *rest, company, torch.tensor([len(company)]))
        assert torch.equal(among_few[140], together[140])


def test_no_mask_rows_change_nothing():
    output, *rest, num = make("one part")
    before = output.clone()
    add_mask_lora(output, *rest, torch.zeros_like(num))
    assert torch.equal(output, before)


def test_rows_of_an_earlier_larger_step_are_not_touched():
    """vLLM's dummy steps run with what the buffers held: more rows than there are, or behind the end."""
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


def test_shipped_covers_every_dtype_and_both_kernels():
    names = [configuration.name for configuration in module.shipped()]
    assert len(names) == len(set(names))
    for dtype in ("bf16", "fp16", "fp32"):
        assert f"shrink {dtype}" in names and f"expand {dtype} rank 64" in names

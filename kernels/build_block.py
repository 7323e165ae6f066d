"""The next step block: which tree of its set a request takes, and the candidates in its nodes.

One launch, a program a request: it chooses the tree by what its candidates promise (`choice_table.py`), and writes the
block. Whatever source the candidates come from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .candidates import Candidates
from .checks import INT32, INTEGERS, check_device, check_tensor, kind_of, remember
from .choice_table import ChoiceTable
from .shipped import Shipped
from .tree_table import TreeTable

# Token id of padding rows: embeds like any other, and the walk never looks at rows after a line's nodes.
PADDING_TOKEN = 0
INT64 = (torch.int64,)

_checked: set[object] = set()


def build_block(
    # of B requests, as many ranks as the table, as many depths or more; `Candidates.none` where no request has any
    candidates: Candidates,
    # [B] int64, place of each request between steps
    slots: torch.Tensor,
    # id of mask M1; Mj has first_mask_id + j - 1
    first_mask_id: int,
    table: TreeTable,
    choice: ChoiceTable,
    # which set the trees are of
    set_index: int,
    # Outputs. [B, R-1] int32 or int64, rows 1 to R-1 of each block: candidates, mask ids, padding
    draft_tokens: torch.Tensor,
    # [slots] int32, line of each request's next block
    line_of_slot: torch.Tensor,
) -> None:
    """Choose and fill the next blocks: draft node (depth d+1, rank r) gets candidate r of depth d+1.

    Rows after the end of a line that is shorter than R get PADDING_TOKEN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    inputs = (*vars(candidates).values(), slots, draft_tokens, line_of_slot)
    kind = (table.num_ranks, *kind_of(inputs))
    if kind not in _checked:
        _check(candidates, slots, table, choice, draft_tokens, line_of_slot)
        remember(kind, _checked)
    num_requests = len(slots)
    if num_requests == 0:
        return
    num_templates = choice.num_templates[set_index]
    num_depths = candidates.tokens.shape[1]
    _build_block_kernel[(num_requests,)](
        candidates.tokens,
        candidates.chance,
        candidates.depths,
        slots,
        choice.lines,
        choice.places,
        choice.weight,
        choice.correction,
        table.rank,
        table.depth,
        table.mask_index,
        draft_tokens,
        line_of_slot,
        set_index,
        num_depths,
        min(choice.mask_depths[set_index], num_depths),
        num_templates,
        first_mask_id,
        table.num_rows,
        len(table.num_nodes),
        choice.num_nodes,
        choice.lines.shape[2],
        PADDING_TOKEN=PADDING_TOKEN,
        MAX_DEPTH=table.max_depth,
        MASK_DEPTH=choice.mask_depth,
        NUM_RANKS=table.num_ranks,
        HAS_COPIES=table.has_copies,
        CHOOSES=num_depths > 0 and num_templates > 1,
        **block_sizes(table.num_rows, choice.num_nodes, choice.lines.shape[2]),
    )


@triton.jit
def _most_promising(
    # one request's
    chance_ptr,
    places_ptr,
    weight_ptr,
    correction_ptr,
    rank_ptr,
    depth_ptr,
    # [BLOCK_TEMPLATES] int32
    lines,
    num_templates,
    num_rows,
    num_lines,
    num_nodes,
    MAX_DEPTH: tl.constexpr,
    MASK_DEPTH: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    BLOCK_TEMPLATES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):
    """The line that promises most, the first of equal ones; NaN counts as the greatest, as in torch's argmax."""
    node = tl.arange(0, BLOCK_NODES)[None, :]
    inside = node < num_nodes
    reach = tl.full([BLOCK_TEMPLATES, BLOCK_NODES], 1.0, tl.float32)
    for level in tl.static_range(MAX_DEPTH):
        at = (level * num_lines + lines[:, None]) * num_nodes + node
        place = tl.load(places_ptr + at, mask=inside, other=-1)
        reach *= tl.load(chance_ptr + place, mask=place >= 0, other=1.0)
    at = lines[:, None] * num_nodes + node
    brings = reach * tl.load(weight_ptr + at, mask=inside, other=0.0)
    if HAS_COPIES:
        reached = reach * tl.load(correction_ptr + at, mask=inside, other=0.0)
        at = lines[:, None] * num_rows + node
        is_copy = tl.load(rank_ptr + at, mask=inside, other=-1) == NUM_RANKS - 1
        depth = tl.load(depth_ptr + at, mask=inside, other=0)
        for level in tl.static_range(1, MASK_DEPTH + 1):
            by_masks = tl.sum(tl.where(depth == level, reached, 0.0), axis=1)[:, None]
            news = 1 - tl.minimum(by_masks, 1.0)
            brings *= tl.where(is_copy & (depth == level), news, 1.0)
    promise = tl.sum(brings, axis=1)
    promise = tl.where(promise == promise, promise, float("inf"))
    template = tl.arange(0, BLOCK_TEMPLATES)
    known = template < num_templates
    highest = tl.max(tl.where(known, promise, float("-inf")), axis=0)
    chosen = tl.min(tl.where(known & (promise == highest), template, BLOCK_TEMPLATES), axis=0)
    return tl.sum(tl.where(template == chosen, lines, 0), axis=0)


@triton.jit(do_not_specialize=["set_index", "num_depths", "most_depths", "num_templates"])
def _build_block_kernel(
    tokens_ptr,
    chance_ptr,
    depths_ptr,
    slots_ptr,
    lines_ptr,
    places_ptr,
    weight_ptr,
    correction_ptr,
    rank_ptr,
    depth_ptr,
    mask_index_ptr,
    draft_tokens_ptr,
    line_of_slot_ptr,
    set_index,
    num_depths,
    most_depths,
    num_templates,
    first_mask_id,
    num_rows,
    num_lines,
    num_nodes,
    most_templates,
    PADDING_TOKEN: tl.constexpr,
    MAX_DEPTH: tl.constexpr,
    MASK_DEPTH: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    CHOOSES: tl.constexpr,
    BLOCK_TEMPLATES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a request: the tree is chosen, then its rows are written."""
    request = tl.program_id(0)
    depths = tl.minimum(tl.load(depths_ptr + request), most_depths)
    first = request.to(tl.int64) * num_depths * NUM_RANKS
    lines_ptr += (set_index * (MASK_DEPTH + 1) + depths) * most_templates
    if CHOOSES:
        template = tl.arange(0, BLOCK_TEMPLATES)
        line = _most_promising(
            chance_ptr + first,
            places_ptr,
            weight_ptr,
            correction_ptr,
            rank_ptr,
            depth_ptr,
            tl.load(lines_ptr + template, mask=template < num_templates, other=0),
            num_templates,
            num_rows,
            num_lines,
            num_nodes,
            MAX_DEPTH,
            MASK_DEPTH,
            NUM_RANKS,
            HAS_COPIES,
            BLOCK_TEMPLATES,
            BLOCK_NODES,
        )
    else:
        line = tl.load(lines_ptr)
    tl.store(line_of_slot_ptr + tl.load(slots_ptr + request), line)

    row = tl.arange(0, BLOCK_ROWS)
    inside = (row > 0) & (row < num_rows)
    place = line * num_rows + row
    rank = tl.load(rank_ptr + place, mask=inside, other=-1)
    above = tl.load(depth_ptr + place, mask=inside, other=0) - 1
    mask_index = tl.load(mask_index_ptr + place, mask=inside, other=-1)
    is_node = rank >= 0
    candidate = tl.load(tokens_ptr + first + above * NUM_RANKS + rank, mask=is_node, other=0)
    fixed = tl.where(mask_index >= 0, first_mask_id + mask_index, PADDING_TOKEN)
    token = tl.where(is_node, candidate, fixed.to(tl.int64))
    tl.store(draft_tokens_ptr + request * (num_rows - 1) + row - 1, token, mask=inside)


def block_sizes(num_rows: int, num_nodes: int, num_templates: int) -> dict[str, int]:
    """What a program holds at once."""
    return {
        "BLOCK_TEMPLATES": triton.next_power_of_2(num_templates),
        "BLOCK_NODES": triton.next_power_of_2(num_nodes),
        "BLOCK_ROWS": triton.next_power_of_2(num_rows),
    }


def shipped() -> list[Shipped]:
    """The paper's tree (5 ranks, 52 rows), default sets (4 deep, 16 rows), one with copies, and the largest."""
    pointers = {name: "*i32" for name in _build_block_kernel.arg_names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(("tokens_ptr", "slots_ptr", "draft_tokens_ptr"), "*i64")
    pointers |= dict.fromkeys(("chance_ptr", "weight_ptr", "correction_ptr"), "*fp32")
    integers = (
        "set_index", "num_depths", "most_depths", "num_templates", "first_mask_id", "num_rows",
        "num_lines", "num_nodes", "most_templates",
    )  # fmt: skip
    return [
        Shipped(
            name=f"{num_rows} rows {num_ranks} ranks{kind}",
            kernel=_build_block_kernel,
            signature=pointers | dict.fromkeys(integers, "i32"),
            constexprs={
                "PADDING_TOKEN": PADDING_TOKEN,
                "MAX_DEPTH": max_depth,
                "MASK_DEPTH": mask_depth,
                "NUM_RANKS": num_ranks,
                "HAS_COPIES": max_depth > mask_depth,
                "CHOOSES": bool(kind),
                **block_sizes(num_rows, num_nodes, num_templates),
            },
        )
        for max_depth, mask_depth, num_ranks, num_nodes, num_rows, num_templates, kinds in (
            (3, 3, 5, 13, 52, 1, ("", " choice")),
            (4, 4, 8, 10, 16, 8, ("", " choice")),
            (15, 4, 9, 16, 16, 14, (" choice, copies",)),
            (8, 8, 16, 128, 256, 16, ("", " choice")),
        )
        for kind in kinds
    ]


def _check(
    candidates: Candidates,
    slots: torch.Tensor,
    table: TreeTable,
    choice: ChoiceTable,
    draft_tokens: torch.Tensor,
    line_of_slot: torch.Tensor,
) -> None:
    device = table.device
    check_device(_build_block_kernel, device)
    check_tensor("slots", slots, [None], INT64, device)
    num_requests = len(slots)
    shape = [num_requests, None, table.num_ranks]
    check_tensor("candidates.tokens", candidates.tokens, shape, INT64, device)
    check_tensor(
        "candidates.chance", candidates.chance, candidates.tokens.shape, [torch.float32], device
    )
    check_tensor("candidates.depths", candidates.depths, [num_requests], INT32, device)
    check_tensor("draft_tokens", draft_tokens, [num_requests, table.num_rows - 1], INTEGERS, device)
    check_tensor("line_of_slot", line_of_slot, [None], INT32, device)
    check_tensor("choice.lines", choice.lines, [None, None, None], INT32, device)
    lines = len(table.num_nodes)
    shape = [table.max_depth, lines, choice.num_nodes]
    check_tensor("choice.places", choice.places, shape, INT32, device)
    for name in ("weight", "correction"):
        check_tensor(f"choice.{name}", getattr(choice, name), shape[1:], [torch.float32], device)

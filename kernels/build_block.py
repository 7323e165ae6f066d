"""The next step block: which tree of its set a request takes, top tokens of the chosen mask rows in its nodes.

Two launches: `rank_tokens` gives the best tokens of each chunk of each row; then a program a request merges the chunks,
chooses the tree by what its candidates promise (`choice_table.py`), and writes the block.

`torch.topk` returns the same values; which of several *equal* logits it returns, and in what order, it
leaves open. NaN counts as the greatest value, as in torch; here all NaNs are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import INT32, INTEGERS, TRITON_TYPES, check_device, check_tensor, kind_of, remember
from .choice_table import ChoiceTable
from .rank_tokens import HIGHEST_ID, MAX_RANK, NO_KEY, Ranking, num_chunks, rank_tokens
from .shipped import Shipped
from .tree_table import TreeTable

# Token id of padding rows: embeds like any other, and the walk never looks at rows after a line's nodes.
PADDING_TOKEN = 0
LOW_BITS = tl.constexpr(2**32 - 1)
INT64 = (torch.int64,)

_checked: set[object] = set()


def build_block(
    # [number of logits rows, V] fp32, fp16 or bf16, rows may be strided; None: no request has candidates
    logits: torch.Tensor | None,
    # [B, max_depth] int64, row of `logits` that predicts depth d+1; read for `depths` of them only
    logits_rows: torch.Tensor,
    # [B] int32, depths that have candidates: of accept_tree
    depths: torch.Tensor,
    # [B] int64, place of each request between steps
    slots: torch.Tensor,
    # id of mask M1; Mj has first_mask_id + j - 1
    first_mask_id: int,
    table: TreeTable,
    choice: ChoiceTable,
    # which set the trees are of
    set_index: int,
    # scratch for B requests or more
    ranking: Ranking,
    # Outputs. [B, R-1] int32 or int64, rows 1 to R-1 of each block: candidates, mask ids, padding
    draft_tokens: torch.Tensor,
    # [slots] int32, line of each request's next block
    line_of_slot: torch.Tensor,
) -> None:
    """Choose and fill the next blocks: draft node (depth d+1, rank r) gets the r-th best token of mask row d.

    Rows after the end of a line that is shorter than R get PADDING_TOKEN.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit; ranks above 15; a vocabulary with
            fewer tokens than ranks.
    """
    inputs = (logits_rows, depths, slots, draft_tokens, line_of_slot, *vars(ranking).values())
    kind = (table.max_rank, *kind_of(inputs if logits is None else (*inputs, logits)))
    if kind not in _checked:
        _check(
            logits, logits_rows, depths, slots, table, choice, ranking, draft_tokens, line_of_slot
        )
        remember(kind, _checked)
    num_requests = len(slots)
    if num_requests == 0:
        return
    most_depths = choice.max_depths[set_index] if logits is not None else 0
    num_templates = choice.num_templates[set_index]
    chooses = logits is not None and num_templates > 1
    if logits is not None:
        # Wherever there are sets, so that no request is the first to compile it.
        sums = max(choice.num_templates) > 1
        rank_tokens(logits, logits_rows, depths, most_depths, ranking, sums)
    _, chunks, num_ranks = ranking.keys.shape
    _build_block_kernel[(num_requests,)](
        ranking.keys,
        ranking.log_sums,
        ranking.top,
        ranking.probabilities,
        depths,
        slots,
        choice.lines,
        choice.places,
        choice.weight,
        table.rank,
        table.depth,
        table.mask_index,
        draft_tokens,
        line_of_slot,
        set_index,
        most_depths,
        num_templates,
        first_mask_id,
        chunks,
        table.num_rows,
        len(table.num_nodes),
        choice.num_nodes,
        choice.lines.shape[2],
        PADDING_TOKEN=PADDING_TOKEN,
        MAX_DEPTH=table.max_depth,
        NUM_RANKS=num_ranks,
        CHOOSES=chooses,
        **block_sizes(
            chunks,
            num_ranks,
            table.max_depth,
            table.num_rows,
            choice.num_nodes,
            choice.lines.shape[2],
        ),
    )


@triton.jit
def _row_keys(keys_ptr, depths, num_keys, BLOCK_DEPTH: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """`[BLOCK_DEPTH, BLOCK_KEYS]` all keys of each depth's row, NO_KEY where there are none."""
    depth = tl.arange(0, BLOCK_DEPTH)[:, None]
    index = tl.arange(0, BLOCK_KEYS)[None, :]
    return tl.load(
        keys_ptr + depth * num_keys + index,
        mask=(depth < depths) & (index < num_keys),
        other=NO_KEY,
    )


@triton.jit
def _row_log_sums(
    log_sums_ptr, depths, chunks, BLOCK_DEPTH: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """`[BLOCK_DEPTH]` log of the sum of the exponentials of each depth's logits."""
    depth = tl.arange(0, BLOCK_DEPTH)[:, None]
    chunk = tl.arange(0, BLOCK_CHUNKS)[None, :]
    inside = (depth < depths) & (chunk < chunks)
    parts = tl.load(log_sums_ptr + depth * chunks + chunk, mask=inside, other=float("-inf"))
    highest = tl.max(parts, axis=1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return base + tl.log(tl.sum(tl.exp(parts - base[:, None]), axis=1))


@triton.jit
def _most_promising(
    probabilities_ptr,
    places_ptr,
    weight_ptr,
    # [BLOCK_TEMPLATES] int32
    lines,
    num_templates,
    num_lines,
    num_nodes,
    MAX_DEPTH: tl.constexpr,
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
        reach *= tl.load(probabilities_ptr + place, mask=place >= 0, other=1.0)
    weight = tl.load(weight_ptr + lines[:, None] * num_nodes + node, mask=inside, other=0.0)
    promise = tl.sum(reach * weight, axis=1)
    promise = tl.where(promise == promise, promise, float("inf"))
    template = tl.arange(0, BLOCK_TEMPLATES)
    known = template < num_templates
    highest = tl.max(tl.where(known, promise, float("-inf")), axis=0)
    chosen = tl.min(tl.where(known & (promise == highest), template, BLOCK_TEMPLATES), axis=0)
    return tl.sum(tl.where(template == chosen, lines, 0), axis=0)


@triton.jit(do_not_specialize=["set_index", "most_depths", "num_templates"])
def _build_block_kernel(
    keys_ptr,
    log_sums_ptr,
    top_ptr,
    probabilities_ptr,
    depths_ptr,
    slots_ptr,
    lines_ptr,
    places_ptr,
    weight_ptr,
    rank_ptr,
    depth_ptr,
    mask_index_ptr,
    draft_tokens_ptr,
    line_of_slot_ptr,
    set_index,
    most_depths,
    num_templates,
    first_mask_id,
    chunks,
    num_rows,
    num_lines,
    num_nodes,
    most_templates,
    PADDING_TOKEN: tl.constexpr,
    MAX_DEPTH: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    CHOOSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_TEMPLATES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a request; depths are merged at once, then the tree is chosen, then its rows are written."""
    request = tl.program_id(0)
    depths = tl.minimum(tl.load(depths_ptr + request), most_depths)
    first = request.to(tl.int64) * MAX_DEPTH
    num_keys = chunks * NUM_RANKS
    top_ptr += first * NUM_RANKS
    probabilities_ptr += first * NUM_RANKS
    depth = tl.arange(0, BLOCK_DEPTH)
    keys = _row_keys(keys_ptr + first * num_keys, depths, num_keys, BLOCK_DEPTH, BLOCK_KEYS)
    if CHOOSES:
        log_sums = _row_log_sums(
            log_sums_ptr + first * chunks, depths, chunks, BLOCK_DEPTH, BLOCK_CHUNKS
        )
    for rank in tl.static_range(NUM_RANKS):
        best = tl.max(keys, axis=1)
        tl.store(top_ptr + depth * NUM_RANKS + rank, best, mask=depth < depths)
        if CHOOSES:
            bits = (best >> 32).to(tl.int32)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            probability = tl.exp(bits.to(tl.float32, bitcast=True) - log_sums)
            tl.store(probabilities_ptr + depth * NUM_RANKS + rank, probability, mask=depth < depths)
        keys = tl.where(keys == best[:, None], NO_KEY, keys)
    # Other threads of the program read what these have written.
    tl.debug_barrier()

    lines_ptr += (set_index * (MAX_DEPTH + 1) + depths) * most_templates
    if CHOOSES:
        template = tl.arange(0, BLOCK_TEMPLATES)
        line = _most_promising(
            probabilities_ptr,
            places_ptr,
            weight_ptr,
            tl.load(lines_ptr + template, mask=template < num_templates, other=0),
            num_templates,
            num_lines,
            num_nodes,
            MAX_DEPTH,
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
    key = tl.load(top_ptr + above * NUM_RANKS + rank, mask=is_node, other=0)
    fixed = tl.where(mask_index >= 0, first_mask_id + mask_index, PADDING_TOKEN)
    token = tl.where(is_node, HIGHEST_ID - (key & LOW_BITS), fixed.to(tl.int64))
    tl.store(draft_tokens_ptr + request * (num_rows - 1) + row - 1, token, mask=inside)


def block_sizes(
    chunks: int, num_ranks: int, max_depth: int, num_rows: int, num_nodes: int, num_templates: int
) -> dict[str, int]:
    """Block sizes, and warps enough to hold all keys in registers."""
    depths = triton.next_power_of_2(max_depth)
    keys = triton.next_power_of_2(chunks * num_ranks)
    return {
        "BLOCK_DEPTH": depths,
        "BLOCK_KEYS": keys,
        "BLOCK_CHUNKS": triton.next_power_of_2(chunks),
        "BLOCK_TEMPLATES": triton.next_power_of_2(num_templates),
        "BLOCK_NODES": triton.next_power_of_2(num_nodes),
        "BLOCK_ROWS": triton.next_power_of_2(num_rows),
        "num_warps": 4 if depths * keys <= 4096 else 8,
    }


def shipped() -> list[Shipped]:
    """The paper's tree (5 ranks, 52 rows), a default set (4 deep, 16 rows) and the largest, vocabularies to 256k."""
    pointers = {name: "*i32" for name in _build_block_kernel.arg_names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(("keys_ptr", "top_ptr", "slots_ptr", "draft_tokens_ptr"), "*i64")
    floats = ("log_sums_ptr", "probabilities_ptr", "weight_ptr")
    pointers |= dict.fromkeys(floats, "*fp32")
    integers = (
        "set_index", "most_depths", "num_templates", "first_mask_id", "chunks", "num_rows",
        "num_lines", "num_nodes", "most_templates",
    )  # fmt: skip
    listed = []
    for max_depth, num_ranks, num_nodes, num_rows, num_templates, vocab_size in (
        (3, 5, 13, 52, 1, 128 * 1024),
        (4, 8, 10, 16, 8, 128 * 1024),
        (8, MAX_RANK, 128, 256, 16, 256 * 1024),
    ):
        chunks = num_chunks(vocab_size)
        blocks = block_sizes(chunks, num_ranks, max_depth, num_rows, num_nodes, num_templates)
        num_warps = blocks.pop("num_warps")
        for chooses in (False, True):
            listed.append(
                Shipped(
                    name=f"{num_rows} rows {num_ranks} ranks{' choice' if chooses else ''}",
                    kernel=_build_block_kernel,
                    signature=pointers | dict.fromkeys(integers, "i32"),
                    constexprs={
                        "PADDING_TOKEN": PADDING_TOKEN,
                        "MAX_DEPTH": max_depth,
                        "NUM_RANKS": num_ranks,
                        "CHOOSES": chooses,
                        **blocks,
                    },
                    num_warps=num_warps,
                )
            )
    return listed


def _check(
    logits: torch.Tensor | None,
    logits_rows: torch.Tensor,
    depths: torch.Tensor,
    slots: torch.Tensor,
    table: TreeTable,
    choice: ChoiceTable,
    ranking: Ranking,
    draft_tokens: torch.Tensor,
    line_of_slot: torch.Tensor,
) -> None:
    device = table.device
    check_device(_build_block_kernel, device)
    check_tensor("slots", slots, [None], INT64, device)
    num_requests = len(slots)
    if table.max_rank > MAX_RANK:
        raise ValueError(
            f"table uses {table.max_rank} ranks, expected at most {MAX_RANK} candidates a depth."
        )
    chunks = None
    if logits is not None:
        check_tensor("logits", logits, [None, None], list(TRITON_TYPES), device, contiguous=False)
        chunks = num_chunks(logits.shape[1])
        if logits.shape[1] < table.max_rank:
            raise ValueError(
                f"logits has {logits.shape[1]} tokens, expected at least {table.max_rank}: the template's ranks."
            )
    check_tensor("logits_rows", logits_rows, [num_requests, table.max_depth], INT64, device)
    check_tensor("depths", depths, [num_requests], INT32, device)
    for name, shape, dtype in (
        ("keys", [None, chunks, table.max_rank], torch.int64),
        ("log_sums", [None, chunks], torch.float32),
        ("top", [None, table.max_rank], torch.int64),
        ("probabilities", [None, table.max_rank], torch.float32),
    ):
        tensor = getattr(ranking, name)
        check_tensor(f"ranking.{name}", tensor, shape, [dtype], device)
        if len(tensor) < num_requests * table.max_depth:
            raise ValueError(
                f"ranking.{name} has {len(tensor)} rows, expected at least {num_requests * table.max_depth}."
            )
    check_tensor("draft_tokens", draft_tokens, [num_requests, table.num_rows - 1], INTEGERS, device)
    check_tensor("line_of_slot", line_of_slot, [None], INT32, device)
    check_tensor("choice.lines", choice.lines, [None, table.max_depth + 1, None], INT32, device)
    lines = len(table.num_nodes)
    shape = [table.max_depth, lines, choice.num_nodes]
    check_tensor("choice.places", choice.places, shape, INT32, device)
    check_tensor("choice.weight", choice.weight, shape[1:], [torch.float32], device)

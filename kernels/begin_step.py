"""The beginning of a step: which rows are whose, positions that follow the trees, rows that get logits, mask rows.

One launch for all of it, as each of these is a handful of small operations whose launches cost more than their work.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .checks import INT32, check_device, check_tensor, kind_of, remember
from .shipped import Shipped
from .tree_table import TreeTable

INT64 = (torch.int64,)
# Requests that a program looks at together, to count the mask rows before its own.
BLOCK_REQUESTS = tl.constexpr(128)

_checked: set[object] = set()


def begin_step(
    # [B + 1] int32, first row of each request in the step, then the end
    query_start: torch.Tensor,
    # [B + 1] int32, of rows that vLLM wants logits of: a request with more than one has a block
    cu_num_logits: torch.Tensor,
    # [B] int64, place of each request between steps
    slots: torch.Tensor,
    # [slots] int32, line of the block of the request in each slot
    line_of_slot: torch.Tensor,
    # [rows of the step] int32
    input_ids: torch.Tensor,
    # [rows of the step] int64, KV slot of each row; changed in place, in blocks: committed tokens + depth
    positions: torch.Tensor,
    table: TreeTable,
    # N, nodes of every request that get logits
    num_nodes: int,
    # M, mask rows of every request that get logits in the same pass; 0 for a pass of their own
    num_masks: int,
    # Outputs. [most requests] int32, line of each request's block, -1 without one and after B
    line: torch.Tensor,
    # [most requests] int32, the root's row; without a block the request's last row
    first_row: torch.Tensor,
    # [most requests] int32, rows of the request
    num_rows: torch.Tensor,
    # [most requests] int32, committed tokens before first_row
    context_len: torch.Tensor,
    # [most requests] int32, the block's first mask row: in the step, or among logits_rows where M > 0
    first_mask: torch.Tensor,
    # [B * (N + M) or more] int64, rows of the step: N nodes of each request, then M mask rows of each
    logits_rows: torch.Tensor,
    # [B * N or more] int32, input token of each node
    node_tokens: torch.Tensor,
    # [B * N or more] int64, position of each node in its sequence
    node_positions: torch.Tensor,
    # [B * N or more] int64, slot of each node's request
    node_slots: torch.Tensor,
    # [capacity] int64, mask rows of the step in front, ascending; None where nobody asks
    mask_rows: torch.Tensor | None = None,
    # [1] int64, how many they are
    num_mask_rows: torch.Tensor | None = None,
) -> None:
    """Lay out a step. A request with fewer than N nodes or M mask rows repeats its last one; so does a cut block.

    Every request has at least one row.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    finds_masks = mask_rows is not None and num_mask_rows is not None
    masks: tuple[Any, ...] = (mask_rows, num_mask_rows) if finds_masks else ()
    tensors = (
        query_start, cu_num_logits, slots, line_of_slot, input_ids, positions, line, first_row,
        num_rows, context_len, first_mask, logits_rows, node_tokens, node_positions, node_slots,
    )  # fmt: skip
    kind = (num_nodes, num_masks, table.num_rows, *kind_of((*tensors, *masks)))
    if kind not in _checked:
        _check(table, num_nodes, num_masks, tensors, masks)
        remember(kind, _checked)
    num_requests = len(slots)
    _begin_step_kernel[(num_requests + 1,)](
        query_start,
        cu_num_logits,
        slots,
        line_of_slot,
        input_ids,
        positions,
        table.num_nodes,
        table.num_masks,
        table.depth,
        line,
        first_row,
        num_rows,
        context_len,
        first_mask,
        logits_rows,
        node_tokens,
        node_positions,
        node_slots,
        mask_rows,
        num_mask_rows,
        num_nodes,
        num_masks,
        len(line),
        table.num_rows,
        BLOCK_ROWS=triton.next_power_of_2(table.num_rows),
        FINDS_MASKS=finds_masks,
        num_warps=1,
    )


def begin_step_naive(
    query_start: torch.Tensor,
    cu_num_logits: torch.Tensor,
    slots: torch.Tensor,
    line_of_slot: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    table: TreeTable,
    num_nodes: int,
    num_masks: int,
    line: torch.Tensor,
    first_row: torch.Tensor,
    num_rows: torch.Tensor,
    context_len: torch.Tensor,
    first_mask: torch.Tensor,
    logits_rows: torch.Tensor,
    node_tokens: torch.Tensor,
    node_positions: torch.Tensor,
    node_slots: torch.Tensor,
    mask_rows: torch.Tensor | None = None,
    num_mask_rows: torch.Tensor | None = None,
) -> None:
    """The specification of `begin_step`: the same arguments, one request after the other."""
    num_requests = len(slots)
    found: list[int] = []
    line[num_requests:] = -1
    for request, slot in enumerate(slots.tolist()):
        start, end = query_start[request : request + 2].tolist()
        has_block = bool(cu_num_logits[request + 1] - cu_num_logits[request] > 1)
        own_line = int(line_of_slot[slot]) if has_block else -1
        first, rows = (start, end - start) if has_block else (end - 1, 1)
        nodes, masks = 1, 0
        if has_block:
            nodes, masks = int(table.num_nodes[own_line]), int(table.num_masks[own_line])
        context = int(positions[first])
        for row in range(1, rows):
            positions[first + row] = context + table.depth[own_line, row]
        for place in range(num_nodes):
            row, out = first + min(place, nodes - 1, rows - 1), request * num_nodes + place
            logits_rows[out], node_tokens[out] = row, input_ids[row]
            node_positions[out], node_slots[out] = positions[row], slot
        for place in range(num_masks):
            row = first + min(nodes + place, rows - 1)
            logits_rows[num_requests * num_nodes + request * num_masks + place] = row
        found += range(first + nodes, first + min(nodes + masks, rows))
        line[request], first_row[request], num_rows[request] = own_line, first, end - start
        context_len[request] = context
        first_mask[request] = first + nodes
        if num_masks:
            first_mask[request] = num_requests * num_nodes + request * num_masks
    if mask_rows is not None and num_mask_rows is not None:
        mask_rows[: len(found)] = torch.tensor(found, dtype=torch.int64)
        num_mask_rows[0] = len(found)


@triton.jit(do_not_specialize=["num_nodes", "num_masks"])
def _begin_step_kernel(
    query_start_ptr,
    cu_num_logits_ptr,
    slots_ptr,
    line_of_slot_ptr,
    input_ids_ptr,
    positions_ptr,
    table_nodes_ptr,
    table_masks_ptr,
    table_depth_ptr,
    line_ptr,
    first_row_ptr,
    num_rows_ptr,
    context_len_ptr,
    first_mask_ptr,
    logits_rows_ptr,
    node_tokens_ptr,
    node_positions_ptr,
    node_slots_ptr,
    mask_rows_ptr,
    num_mask_rows_ptr,
    num_nodes,
    num_masks,
    most_requests,
    table_rows,
    BLOCK_ROWS: tl.constexpr,
    FINDS_MASKS: tl.constexpr,
):
    """One program a request, and a last one for what comes after them."""
    request = tl.program_id(0)
    num_requests = tl.num_programs(0) - 1
    masks_before = 0
    if FINDS_MASKS:
        for start in range(0, request, BLOCK_REQUESTS):
            other = start + tl.arange(0, BLOCK_REQUESTS)
            inside = other < request
            logits = tl.load(cu_num_logits_ptr + other + 1, mask=inside, other=0)
            logits -= tl.load(cu_num_logits_ptr + other, mask=inside, other=0)
            inside &= logits > 1
            rows = tl.load(query_start_ptr + other + 1, mask=inside, other=0)
            rows -= tl.load(query_start_ptr + other, mask=inside, other=0)
            slot = tl.load(slots_ptr + other, mask=inside, other=0)
            line = tl.load(line_of_slot_ptr + slot, mask=inside, other=0)
            nodes = tl.load(table_nodes_ptr + line, mask=inside, other=0)
            masks = tl.load(table_masks_ptr + line, mask=inside, other=0)
            masks = tl.maximum(tl.minimum(rows - nodes, masks), 0)
            masks_before += tl.sum(masks, axis=0)
    if request == num_requests:
        if FINDS_MASKS:
            tl.store(num_mask_rows_ptr, masks_before)
        for start in range(num_requests, most_requests, BLOCK_REQUESTS):
            other = start + tl.arange(0, BLOCK_REQUESTS)
            tl.store(line_ptr + other, -1, mask=other < most_requests)
        return

    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    num_logits = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    slot = tl.load(slots_ptr + request)
    has_block = num_logits > 1
    table_line = tl.load(line_of_slot_ptr + slot, mask=has_block, other=0)
    first = tl.where(has_block, start, end - 1)
    rows = tl.where(has_block, end - start, 1)
    nodes = tl.where(has_block, tl.load(table_nodes_ptr + table_line), 1)
    masks = tl.where(has_block, tl.load(table_masks_ptr + table_line), 0)
    context = tl.load(positions_ptr + first)
    tl.store(line_ptr + request, tl.where(has_block, table_line, -1))
    tl.store(first_row_ptr + request, first)
    tl.store(num_rows_ptr + request, end - start)
    tl.store(context_len_ptr + request, context.to(tl.int32))

    place = tl.arange(0, BLOCK_ROWS)
    depth_ptr = table_depth_ptr + table_line * table_rows
    inside = (place > 0) & (place < tl.minimum(rows, table_rows))
    depth = tl.load(depth_ptr + place, mask=inside, other=0)
    tl.store(positions_ptr + first + place, context + depth, mask=inside)

    node = tl.minimum(place, tl.minimum(nodes, rows) - 1)
    wanted = place < num_nodes
    out = request * num_nodes + place
    # Without a block the one node is place 0, whose depth is 0 in every line.
    depth = tl.load(depth_ptr + node, mask=wanted, other=0)
    token = tl.load(input_ids_ptr + first + node, mask=wanted, other=0)
    tl.store(logits_rows_ptr + out, (first + node).to(tl.int64), mask=wanted)
    tl.store(node_tokens_ptr + out, token, mask=wanted)
    tl.store(node_positions_ptr + out, context + depth, mask=wanted)
    tl.store(node_slots_ptr + out, tl.zeros_like(out).to(tl.int64) + slot, mask=wanted)

    mask_out = num_requests * num_nodes + request * num_masks
    tl.store(first_mask_ptr + request, tl.where(num_masks > 0, mask_out, first + nodes))
    row = first + tl.minimum(nodes + place, rows - 1)
    tl.store(logits_rows_ptr + mask_out + place, row.to(tl.int64), mask=place < num_masks)
    if FINDS_MASKS:
        held = tl.minimum(rows - nodes, masks)
        row = (first + nodes + place).to(tl.int64)
        tl.store(mask_rows_ptr + masks_before + place, row, mask=place < held)


def shipped() -> list[Shipped]:
    """The default's 16 rows, the paper's 52 and the most that templates allow, with deltas and without."""
    names = _begin_step_kernel.arg_names
    signature = {name: "*i32" for name in names if name.endswith("_ptr")}
    wide = ("slots", "positions", "logits_rows", "node_positions", "node_slots")
    signature |= {f"{name}_ptr": "*i64" for name in (*wide, "mask_rows", "num_mask_rows")}
    signature |= dict.fromkeys(("num_nodes", "num_masks", "most_requests", "table_rows"), "i32")
    listed = []
    for num_rows in (16, 52, 256):
        for finds_masks in (False, True):
            absent = {} if finds_masks else dict.fromkeys(("mask_rows_ptr", "num_mask_rows_ptr"))
            listed.append(
                Shipped(
                    name=f"{num_rows} rows{' deltas' if finds_masks else ''}",
                    kernel=_begin_step_kernel,
                    signature={n: kind for n, kind in signature.items() if n not in absent},
                    constexprs={
                        "BLOCK_ROWS": triton.next_power_of_2(num_rows),
                        "FINDS_MASKS": finds_masks,
                        **absent,
                    },
                    num_warps=1,
                )
            )
    return listed


def _check(
    table: TreeTable,
    num_nodes: int,
    num_masks: int,
    tensors: tuple[torch.Tensor, ...],
    masks: tuple[torch.Tensor, ...],
) -> None:
    device = table.device
    check_device(_begin_step_kernel, device)
    requests, most_requests, num_rows = len(tensors[2]), len(tensors[6]), len(tensors[4])
    shapes = (
        ("query_start", requests + 1, INT32),
        ("cu_num_logits", requests + 1, INT32),
        ("slots", requests, INT64),
        ("line_of_slot", None, INT32),
        ("input_ids", num_rows, INT32),
        ("positions", num_rows, INT64),
        ("line", most_requests, INT32),
        ("first_row", most_requests, INT32),
        ("num_rows", most_requests, INT32),
        ("context_len", most_requests, INT32),
        ("first_mask", most_requests, INT32),
        ("logits_rows", None, INT64),
        ("node_tokens", None, INT32),
        ("node_positions", None, INT64),
        ("node_slots", None, INT64),
        ("mask_rows", None, INT64),
        ("num_mask_rows", 1, INT64),
    )
    # Without masks the two last names have no tensor.
    for (name, length, dtypes), tensor in zip(shapes, (*tensors, *masks), strict=False):
        check_tensor(name, tensor, [length], dtypes, device)
    if not 1 <= num_nodes <= table.num_rows or not 0 <= num_masks < table.num_rows:
        raise ValueError(
            f"num_nodes is {num_nodes} and num_masks {num_masks}, expected 1 to R and 0 to R - 1, "
            f"where R = {table.num_rows}."
        )
    if most_requests < requests:
        raise ValueError(f"line has {most_requests} places, expected one for {requests} requests.")
    for (name, *_), tensor in zip(shapes[11:15], tensors[11:15], strict=True):
        wanted = requests * (num_nodes + num_masks * (name == "logits_rows"))
        if len(tensor) < wanted:
            raise ValueError(f"{name} has {len(tensor)} places, expected at least {wanted}.")

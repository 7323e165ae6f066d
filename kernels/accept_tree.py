"""Verification: walk each request's tree along the target's own tokens.

At a node take the target's token; if a child holds it, go there, else stop. The tokens taken are the
output. Two children may hold it, a mask's candidate and a copied token: the walk goes on below both, and the first
stands for them, as their rows hold the same. The mask rows that predict the positions after the stop give the
candidates of the next block.

Greedy targets are `torch.argmax(logits, dim=-1, out=target_tokens)`: one launch that reads the logits
once, in their own dtype (no fp32 copy), and writes 8 bytes a row. Ties go to the lowest token id, NaN counts as
the greatest value, as in vLLM's greedy sampler. A kernel of our own could read no less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import FLAGS, INT32, INTEGERS, check_device, check_tensor, kind_of, remember
from .shipped import Shipped
from .tree_table import TreeTable

_checked: set[object] = set()


def accept_tree(
    # [num targets] int32 or int64, the target's own token (argmax or sample) of node rows
    target_tokens: torch.Tensor,
    # [rows of the step] int32 or int64, input tokens
    row_tokens: torch.Tensor,
    # [B] int32, where the root's target lies in target_tokens; its nodes' targets follow
    first_target: torch.Tensor,
    # [B] int32, the root's row in the step; without a block the request's last row
    first_row: torch.Tensor,
    # [B] int32, rows of the request in this step; blocks may be cut anywhere
    num_rows: torch.Tensor,
    # [B] int32, line of the table, -1 for a request without a block
    line: torch.Tensor,
    # [B] bool, False for requests that must not emit a token (partial prefill, padding)
    emitting: torch.Tensor,
    # [B] int32, where the block's first mask row lies: in the step, or wherever mask rows are wanted in
    first_mask: torch.Tensor,
    table: TreeTable,
    # Outputs. [B, max_depth + 3] int32 or int64, emitted tokens, -1 after the last; then the request's line, and the
    # row in the block where the walk stopped: one buffer, as it travels to the host
    tokens: torch.Tensor,
    # [B, max_depth + 1] int32, row in the block at each step of the walk, 0 after the last
    path: torch.Tensor,
    # [B] int32, tokens emitted
    num_emitted: torch.Tensor,
    # [B] int32, depths of the next block that have candidates
    next_depths: torch.Tensor,
    # [B, max_depth] int32 or int64, row that predicts depth d+1 of the next block, counted as first_mask, or -1
    mask_rows: torch.Tensor,
) -> None:
    """Walk, accepted tokens, and where the next candidates come from; writes every output, nothing else.

    A request emits nothing if it does not emit or has no rows; one without a block emits its target.
    Where target tokens exist for every row of the step, `first_target` is `first_row`.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    tensors = (
        target_tokens, row_tokens, first_target, first_row, num_rows, line, emitting, first_mask,
        tokens, path, num_emitted, next_depths, mask_rows,
    )  # fmt: skip
    kind = (table.max_depth, *kind_of(tensors))
    if kind not in _checked:
        _check(table, tensors)
        remember(kind, _checked)
    num_requests = len(line)
    if num_requests == 0:
        return
    _accept_tree_kernel[(num_requests,)](
        target_tokens,
        row_tokens,
        first_target,
        first_row,
        num_rows,
        line,
        emitting,
        first_mask,
        table.num_nodes,
        table.parent,
        table.candidate_rows,
        tokens,
        path,
        num_emitted,
        next_depths,
        mask_rows,
        table.num_rows,
        table.max_nodes,
        MAX_DEPTH=table.max_depth,
        **launch_options(table.max_nodes, table.max_depth),
    )


def accept_tree_naive(
    target_tokens: torch.Tensor,
    row_tokens: torch.Tensor,
    first_target: torch.Tensor,
    first_row: torch.Tensor,
    num_rows: torch.Tensor,
    line: torch.Tensor,
    emitting: torch.Tensor,
    first_mask: torch.Tensor,
    table: TreeTable,
    tokens: torch.Tensor,
    path: torch.Tensor,
    num_emitted: torch.Tensor,
    next_depths: torch.Tensor,
    mask_rows: torch.Tensor,
) -> None:
    """The specification of `accept_tree`: the same arguments, one request after the other."""
    for request in range(len(line)):
        own_line, rows = int(line[request]), int(num_rows[request])
        root, first = int(first_row[request]), int(first_target[request])
        num_nodes = min(int(table.num_nodes[own_line]), rows) if own_line >= 0 else min(1, rows)
        tokens[request], path[request], mask_rows[request] = -1, 0, -1
        followed = [0] if emitting[request] and rows > 0 else []
        emitted = stopped_at = 0
        while followed:
            stopped_at, target = followed[0], int(target_tokens[first + followed[0]])
            tokens[request, emitted], path[request, emitted] = target, stopped_at
            emitted += 1
            ends = followed[0], followed[-1]
            followed = [
                child
                for child in range(1, num_nodes)
                if table.parent[own_line, child] in ends and row_tokens[root + child] == target
            ]
        candidates = table.candidate_rows[own_line, stopped_at].tolist() if own_line >= 0 else []
        available = 0
        while available < len(candidates) and 0 <= candidates[available] < rows:
            which = candidates[available] - int(table.num_nodes[own_line])
            mask_rows[request, available] = int(first_mask[request]) + which
            available += 1
        num_emitted[request], next_depths[request] = emitted, available
        tokens[request, -2], tokens[request, -1] = own_line, stopped_at


@triton.jit
def _accept_tree_kernel(
    target_tokens_ptr,
    row_tokens_ptr,
    first_target_ptr,
    first_row_ptr,
    num_rows_ptr,
    line_ptr,
    emitting_ptr,
    first_mask_ptr,
    num_nodes_ptr,
    parent_ptr,
    candidate_rows_ptr,
    tokens_ptr,
    path_ptr,
    num_emitted_ptr,
    next_depths_ptr,
    mask_rows_ptr,
    table_rows,
    table_nodes,
    MAX_DEPTH: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One program a request. Its nodes are read at once; the walk itself touches registers only."""
    request = tl.program_id(0)
    line = tl.load(line_ptr + request)
    num_rows = tl.load(num_rows_ptr + request)
    first_row = tl.load(first_row_ptr + request)
    first_target = tl.load(first_target_ptr + request)
    has_block = line >= 0
    table_line = tl.maximum(line, 0)
    line_nodes = tl.load(num_nodes_ptr + table_line)
    num_nodes = tl.minimum(tl.where(has_block, line_nodes, 1), num_rows)

    node_rows = tl.arange(0, BLOCK_NODES)
    inside = node_rows < num_nodes
    parent = tl.load(parent_ptr + table_line * table_rows + node_rows, mask=inside, other=-1)
    # The root's own parent is -1 and the walk is never there, so the root is nobody's child.
    held = tl.load(row_tokens_ptr + first_row + node_rows, mask=inside, other=-1).to(tl.int64)
    targets = tl.load(target_tokens_ptr + first_target + node_rows, mask=inside, other=-1)
    targets = targets.to(tl.int64)

    walking = (tl.load(emitting_ptr + request) != 0) & (num_rows > 0)
    node = 0
    last = 0
    emitted = 0
    out = tokens_ptr + request * (MAX_DEPTH + 3)
    for step in tl.static_range(MAX_DEPTH + 1):
        target = tl.sum(tl.where(node_rows == node, targets, 0), axis=0)
        tl.store(out + step, tl.where(walking, target, -1))
        tl.store(path_ptr + request * (MAX_DEPTH + 1) + step, tl.where(walking, node, 0))
        emitted += walking.to(tl.int32)
        matches = inside & ((parent == node) | (parent == last)) & (held == target)
        child = tl.min(tl.where(matches, node_rows, BLOCK_NODES), axis=0)
        last = tl.max(tl.where(matches, node_rows, -1), axis=0)
        walking = walking & (child < BLOCK_NODES)
        node = tl.where(walking, child, node)
    tl.store(num_emitted_ptr + request, emitted)
    tl.store(out + MAX_DEPTH + 1, line)
    tl.store(out + MAX_DEPTH + 2, node)

    depths = tl.arange(0, BLOCK_DEPTH)
    candidates = tl.load(
        candidate_rows_ptr + (table_line * table_nodes + node) * MAX_DEPTH + depths,
        mask=depths < MAX_DEPTH,
        other=-1,
    )
    usable = (candidates >= 0) & (candidates < tl.where(has_block, num_rows, 0))
    available = tl.min(tl.where(usable, BLOCK_DEPTH, depths), axis=0)
    tl.store(next_depths_ptr + request, available)
    first_mask = tl.load(first_mask_ptr + request)
    tl.store(
        mask_rows_ptr + request * MAX_DEPTH + depths,
        tl.where(depths < available, first_mask + candidates - line_nodes, -1),
        mask=depths < MAX_DEPTH,
    )


def launch_options(max_nodes: int, max_depth: int) -> dict[str, int]:
    """Block sizes; a warp a request: the walk is a chain of small reductions, which a warp does without barriers."""
    return {
        "BLOCK_NODES": triton.next_power_of_2(max_nodes),
        "BLOCK_DEPTH": triton.next_power_of_2(max_depth),
        "num_warps": 1,
    }


def shipped() -> list[Shipped]:
    """The paper's tree (13 nodes, depth 3) and the largest that templates allow, both token types."""
    listed = []
    for max_nodes, max_depth in ((13, 3), (128, 8)):
        options = launch_options(max_nodes, max_depth)
        for token in ("i32", "i64"):
            signature = {
                name: "*i32" for name in _accept_tree_kernel.arg_names if name.endswith("_ptr")
            }
            signature |= dict.fromkeys(("target_tokens_ptr", "row_tokens_ptr"), f"*{token}")
            signature |= {"tokens_ptr": f"*{token}", "emitting_ptr": "*i1"}
            signature |= {"mask_rows_ptr": "*i64"}  # an index into hidden states
            signature |= {"table_rows": "i32", "table_nodes": "i32"}
            listed.append(
                Shipped(
                    name=f"{max_nodes} nodes depth {max_depth} {token}",
                    kernel=_accept_tree_kernel,
                    signature=signature,
                    constexprs={
                        "MAX_DEPTH": max_depth,
                        "BLOCK_NODES": options["BLOCK_NODES"],
                        "BLOCK_DEPTH": options["BLOCK_DEPTH"],
                    },
                    num_warps=options["num_warps"],
                )
            )
    return listed


def _check(table: TreeTable, tensors: tuple[torch.Tensor, ...]) -> None:
    check_device(_accept_tree_kernel, table.device)
    requests, depth = len(tensors[5]), table.max_depth
    shapes: tuple[tuple[str, list[int | None], tuple[torch.dtype, ...]], ...] = (
        ("target_tokens", [None], INTEGERS),
        ("row_tokens", [None], INTEGERS),
        ("first_target", [requests], INT32),
        ("first_row", [requests], INT32),
        ("num_rows", [requests], INT32),
        ("line", [None], INT32),
        ("emitting", [requests], FLAGS),
        ("first_mask", [requests], INT32),
        ("tokens", [requests, depth + 3], INTEGERS),
        ("path", [requests, depth + 1], INT32),
        ("num_emitted", [requests], INT32),
        ("next_depths", [requests], INT32),
        ("mask_rows", [requests, depth], INTEGERS),
    )
    for (name, shape, dtypes), tensor in zip(shapes, tensors, strict=True):
        check_tensor(name, tensor, shape, dtypes, table.device)

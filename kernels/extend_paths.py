"""The walk one depth at a time, for samplers that look at the tokens before a row (penalties, bad words).

Each request's path so far is laid out as a chain of drafts, as such samplers want it: rows of the same request, one
after the other. What they sample for the last row leads to the next node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import INT32, check_device, check_tensor, kind_of, remember
from .shipped import Shipped
from .tree_table import TreeTable

INT64 = (torch.int64,)

_checked: set[object] = set()


@dataclass(frozen=True)
class Chains:
    """The paths of B requests, D = max_depth; `length` rows of each request lie in front, request by request.

    Attributes:
        path: `[B, D + 1]` int32, node at each depth.
        last: `[B]` int32, the last node that the walk follows: a copied token beside the path's own node, or that node.
        walking: `[B]` int32, 1 while a child holds what was sampled.
        rows: `[B * (D + 1)]` int64, place of each row among the nodes of all requests.
        tokens: `[B * (D + 1)]` int32, input token; positions: int64; slots: int64; local: int32, depth.
        targets: `[B * N]` int64, what was sampled for each node, -1 where nothing was.
    """

    path: torch.Tensor
    last: torch.Tensor
    walking: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    local: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def empty(cls, num_requests: int, num_nodes: int, table: TreeTable) -> Chains:
        """Allocate them on the table's device."""
        steps = table.max_depth + 1

        def of(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=table.device)

        rows = num_requests * steps
        return cls(
            path=of(num_requests, steps),
            last=of(num_requests),
            walking=of(num_requests),
            rows=of(rows, dtype=torch.int64),
            tokens=of(rows),
            positions=of(rows, dtype=torch.int64),
            slots=of(rows, dtype=torch.int64),
            local=of(rows),
            targets=of(num_requests * num_nodes, dtype=torch.int64),
        )


def extend_paths(
    # [B * length] int64, sampled for every row of the chains; None at the beginning, where length is 0
    sampled: torch.Tensor | None,
    # rows of each chain so far
    length: int,
    # [B] int32, line of each request's block, -1 without one
    line: torch.Tensor,
    # [B] int32, rows of each request in the step: a block may be cut
    num_rows: torch.Tensor,
    # [B * N] int32, input token of each node
    node_tokens: torch.Tensor,
    # [B * N] int64
    node_positions: torch.Tensor,
    # [B] int64, place of each request between steps
    slots: torch.Tensor,
    table: TreeTable,
    # In and out
    chains: Chains,
) -> None:
    """Take each path to the child that holds what its last row sampled; it stays where none does.

    Writes the chains of `length + 1` rows, and the last rows' targets. At the beginning every path is at its root.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    state = tuple(vars(chains).values())
    inputs = (line, num_rows, node_tokens, node_positions, slots)
    given = inputs if sampled is None else (*inputs, sampled)
    kind = (length, table.max_depth, *kind_of((*given, *state)))
    if kind not in _checked:
        _check(sampled, length, inputs, table, chains)
        remember(kind, _checked)
    num_requests = len(line)
    _extend_paths_kernel[(num_requests,)](
        chains.targets if sampled is None else sampled,
        line,
        num_rows,
        node_tokens,
        node_positions,
        slots,
        table.num_nodes,
        table.parent,
        *state,
        length,
        len(node_tokens) // num_requests,
        table.num_rows,
        MAX_DEPTH=table.max_depth,
        BLOCK_NODES=triton.next_power_of_2(table.max_nodes),
        BLOCK_DEPTH=triton.next_power_of_2(table.max_depth + 1),
        num_warps=1,
    )


def extend_paths_naive(
    sampled: torch.Tensor | None,
    length: int,
    line: torch.Tensor,
    num_rows: torch.Tensor,
    node_tokens: torch.Tensor,
    node_positions: torch.Tensor,
    slots: torch.Tensor,
    table: TreeTable,
    chains: Chains,
) -> None:
    """The specification of `extend_paths`: the same arguments, one request after the other."""
    num_requests = len(line)
    num_nodes = len(node_tokens) // num_requests
    for request in range(num_requests):
        first, own_line = request * num_nodes, int(line[request])
        node = last = 0
        if sampled is None:
            chains.targets[first : first + num_nodes] = -1
            chains.walking[request] = 1
        else:
            node = last = int(chains.path[request, length - 1])
            token = int(sampled[(request + 1) * length - 1])
            if chains.walking[request]:
                chains.targets[first + node] = token
                own = (
                    min(int(table.num_nodes[own_line]), int(num_rows[request]))
                    if own_line >= 0
                    else 1
                )
                children = [
                    child
                    for child in range(1, own)
                    if table.parent[own_line, child] in (node, int(chains.last[request]))
                    and node_tokens[first + child] == token
                ]
                chains.walking[request] = bool(children)
                node, last = (children[0], children[-1]) if children else (node, node)
        chains.last[request] = last
        if length > table.max_depth:
            continue
        chains.path[request, length] = node
        for depth, at in enumerate(chains.path[request, : length + 1].tolist()):
            out = request * (length + 1) + depth
            chains.rows[out], chains.slots[out], chains.local[out] = (
                first + at,
                slots[request],
                depth,
            )
            chains.tokens[out] = node_tokens[first + at]
            chains.positions[out] = node_positions[first + at]


@triton.jit(do_not_specialize=["length", "num_nodes"])
def _extend_paths_kernel(
    sampled_ptr,
    line_ptr,
    num_rows_ptr,
    node_tokens_ptr,
    node_positions_ptr,
    slots_ptr,
    table_nodes_ptr,
    parent_ptr,
    path_ptr,
    last_ptr,
    walking_ptr,
    chain_rows_ptr,
    chain_tokens_ptr,
    chain_positions_ptr,
    chain_slots_ptr,
    chain_local_ptr,
    targets_ptr,
    length,
    num_nodes,
    table_rows,
    MAX_DEPTH: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One program a request."""
    request = tl.program_id(0)
    started = length > 0
    path_ptr += request * (MAX_DEPTH + 1)
    first = request * num_nodes
    line = tl.load(line_ptr + request)
    table_line = tl.maximum(line, 0)
    own = tl.minimum(tl.load(table_nodes_ptr + table_line), tl.load(num_rows_ptr + request))
    own = tl.where(line >= 0, own, 1)

    place = tl.arange(0, BLOCK_NODES)
    tl.store(targets_ptr + first + place, -1, mask=place < tl.where(started, 0, num_nodes))
    node = tl.load(path_ptr + length - 1, mask=started, other=0)
    walking = tl.load(walking_ptr + request, mask=started, other=0) != 0
    token = tl.load(sampled_ptr + (request + 1) * length - 1, mask=started, other=-1)
    tl.store(targets_ptr + first + node, token, mask=walking)
    inside = (place > 0) & (place < own)
    parent = tl.load(parent_ptr + table_line * table_rows + place, mask=inside, other=-1)
    held = tl.load(node_tokens_ptr + first + place, mask=inside, other=-1)
    last = tl.load(last_ptr + request, mask=started, other=0)
    matches = inside & ((parent == node) | (parent == last)) & (held == token)
    child = tl.min(tl.where(matches, place, BLOCK_NODES), axis=0)
    walking &= child < BLOCK_NODES
    node = tl.where(walking, child, node)
    last = tl.where(walking, tl.max(tl.where(matches, place, 0), axis=0), node)
    tl.store(last_ptr + request, last)
    grows = length <= MAX_DEPTH
    tl.store(walking_ptr + request, tl.where(started, walking.to(tl.int32), 1))
    tl.store(path_ptr + length, node, mask=grows)

    depth = tl.arange(0, BLOCK_DEPTH)
    inside = depth < tl.where(grows, length + 1, 0)
    at = tl.load(path_ptr + depth, mask=depth < length, other=0)
    row = first + tl.where(depth == length, node, at)
    out = request * (length + 1) + depth
    slot = tl.load(slots_ptr + request)
    tl.store(chain_rows_ptr + out, row.to(tl.int64), mask=inside)
    tl.store(chain_tokens_ptr + out, tl.load(node_tokens_ptr + row, mask=inside), mask=inside)
    tl.store(chain_positions_ptr + out, tl.load(node_positions_ptr + row, mask=inside), mask=inside)
    tl.store(chain_slots_ptr + out, tl.zeros_like(out).to(tl.int64) + slot, mask=inside)
    tl.store(chain_local_ptr + out, depth, mask=inside)


def shipped() -> list[Shipped]:
    """The paper's tree (13 nodes, depth 3) and the largest that templates allow."""
    signature = {n: "*i32" for n in _extend_paths_kernel.arg_names if n.endswith("_ptr")}
    wide = ("sampled", "node_positions", "slots", "chain_rows", "chain_positions", "chain_slots")
    signature |= {f"{name}_ptr": "*i64" for name in (*wide, "targets")}
    signature |= dict.fromkeys(("length", "num_nodes", "table_rows"), "i32")
    return [
        Shipped(
            name=f"{max_nodes} nodes depth {max_depth}",
            kernel=_extend_paths_kernel,
            signature=signature,
            constexprs={
                "MAX_DEPTH": max_depth,
                "BLOCK_NODES": triton.next_power_of_2(max_nodes),
                "BLOCK_DEPTH": triton.next_power_of_2(max_depth + 1),
            },
            num_warps=1,
        )
        for max_nodes, max_depth in ((13, 3), (128, 8))
    ]


def _check(
    sampled: torch.Tensor | None,
    length: int,
    inputs: tuple[torch.Tensor, ...],
    table: TreeTable,
    chains: Chains,
) -> None:
    device, steps = table.device, table.max_depth + 1
    check_device(_extend_paths_kernel, device)
    requests, nodes = len(inputs[0]), len(inputs[2])
    if not (0 if sampled is None else 1) <= length <= (0 if sampled is None else steps):
        raise ValueError(
            f"length is {length}, expected 0 at the beginning, then 1 to {steps}: depths of the walk."
        )
    if not requests or nodes % requests:
        raise ValueError(
            f"node_tokens has {nodes} places for {requests} requests, expected as many for each of them."
        )
    if sampled is not None:
        check_tensor("sampled", sampled, [requests * length], INT64, device)
    for (name, size, dtypes), tensor in zip(
        (
            ("line", requests, INT32),
            ("num_rows", requests, INT32),
            ("node_tokens", nodes, INT32),
            ("node_positions", nodes, INT64),
            ("slots", requests, INT64),
        ),
        inputs,
        strict=True,
    ):
        check_tensor(name, tensor, [size], dtypes, device)
    rows = requests * steps
    for name, shape, dtypes in (
        ("path", [requests, steps], INT32),
        ("walking", [requests], INT32),
        ("rows", [rows], INT64),
        ("tokens", [rows], INT32),
        ("positions", [rows], INT64),
        ("slots", [rows], INT64),
        ("local", [rows], INT32),
        ("targets", [nodes], INT64),
    ):
        check_tensor(f"chains.{name}", getattr(chains, name), shape, dtypes, device)

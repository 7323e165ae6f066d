"""The next step block: top tokens of the chosen mask rows, placed where the template wants them.

Two launches, as a vocabulary is too long for one program: every chunk of every row gives its own top-k,
then the chunks of a row are merged and its candidates placed. Values and ids travel as one int64 key,
so that the order is total: higher logit first, then the lower token id.

`torch.topk` returns the same values; which of several *equal* logits it returns, and in what order, it
leaves open. NaN counts as the greatest value, as in torch; here all NaNs are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import INT32, INTEGERS, TRITON_TYPES, check_device, check_tensor
from .shipped import Shipped
from .tree_table import TreeTable

MAX_RANK = 16
# Tokens a program ranks: 32 keys a thread. V = 128k makes 32 programs a row.
CHUNK = 4096
# Token id of padding rows: embeds like any other, and the walk never looks at rows behind a line's nodes.
PADDING_TOKEN = 0
# Below the key of any token.
NO_KEY = tl.constexpr(-(2**63))
LOW_BITS = tl.constexpr(2**32 - 1)
HIGHEST_ID = tl.constexpr(2**31 - 1)


def workspace_shape(num_requests: int, vocab_size: int, table: TreeTable) -> tuple[int, int, int]:
    """Shape of the int64 workspace: `[B * max_depth, chunks, max_rank]`."""
    return num_requests * table.max_depth, triton.cdiv(vocab_size, CHUNK), table.max_rank


def build_block(
    # [number of logits rows, V] fp32, fp16 or bf16; rows may be strided
    logits: torch.Tensor,
    # [B, max_depth] int32, row of `logits` that predicts depth d+1; read for depths of the line only
    logits_rows: torch.Tensor,
    # [B] int32, line of the next block: of accept_tree's next_line depths
    line: torch.Tensor,
    # id of mask M1; Mj has first_mask_id + j - 1
    first_mask_id: int,
    table: TreeTable,
    # [B * max_depth, chunks, max_rank] int64, scratch: workspace_shape
    workspace: torch.Tensor,
    # Output. [B, R-1] int32 or int64, rows 1 to R-1 of each block: candidates, mask ids, padding
    draft_tokens: torch.Tensor,
) -> None:
    """Fill the next blocks: draft node (depth d+1, rank r) gets the r-th best token of mask row d.

    Rows behind the end of a line that is shorter than R get PADDING_TOKEN.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit; ranks above 15; a vocabulary with
            fewer tokens than ranks.
    """
    check_device(_build_block_kernel, table.device)
    _check(logits, logits_rows, line, table, workspace, draft_tokens)
    num_requests, vocab_size = len(line), logits.shape[1]
    if num_requests == 0:
        return
    rows, chunks, num_ranks = workspace_shape(num_requests, vocab_size, table)
    _rank_chunks_kernel[(rows, chunks)](
        logits,
        logits_rows,
        line,
        table.num_depths,
        workspace,
        logits.stride(0),
        vocab_size,
        table.max_depth,
        CHUNK=CHUNK,
        NUM_RANKS=num_ranks,
    )
    _build_block_kernel[(num_requests, table.max_depth)](
        workspace,
        line,
        table.num_depths,
        table.rank,
        table.depth,
        table.mask_index,
        draft_tokens,
        first_mask_id,
        chunks * num_ranks,
        table.num_rows,
        table.max_depth,
        PADDING_TOKEN=PADDING_TOKEN,
        NUM_RANKS=num_ranks,
        BLOCK_KEYS=triton.next_power_of_2(chunks * num_ranks),
        BLOCK_ROWS=triton.next_power_of_2(table.num_rows),
    )


def build_block_naive(
    logits: torch.Tensor,
    logits_rows: torch.Tensor,
    line: torch.Tensor,
    first_mask_id: int,
    table: TreeTable,
    workspace: torch.Tensor,
    draft_tokens: torch.Tensor,
) -> None:
    """The specification of `build_block`: the same arguments (the workspace is not used)."""
    draft_tokens.fill_(PADDING_TOKEN)
    for request, own_line in enumerate(line.tolist()):
        for row in range(1, table.num_rows):
            rank, mask_index = int(table.rank[own_line, row]), int(table.mask_index[own_line, row])
            if rank >= 0:
                candidates = logits[logits_rows[request, table.depth[own_line, row] - 1]]
                # A stable sort keeps equal logits in the order of their ids; NaN sorts as the greatest.
                order = torch.sort(candidates, descending=True, stable=True).indices
                draft_tokens[request, row - 1] = order[rank]
            elif mask_index >= 0:
                draft_tokens[request, row - 1] = first_mask_id + mask_index


@triton.jit
def _rank_chunks_kernel(
    logits_ptr,
    logits_rows_ptr,
    line_ptr,
    num_depths_ptr,
    workspace_ptr,
    logits_stride,
    vocab_size,
    max_depth,
    CHUNK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
):
    """Best NUM_RANKS keys of one chunk of one mask row, best first."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    line = tl.load(line_ptr + row // max_depth)
    if row % max_depth < tl.load(num_depths_ptr + line):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        logits_row = tl.load(logits_rows_ptr + row).to(tl.int64)
        logit = tl.load(
            logits_ptr + logits_row * logits_stride + token, mask=token < vocab_size, other=0.0
        ).to(tl.float32)
        # One bit pattern for what compares equal (-0 and 0), and one for all NaNs, above infinity.
        logit = tl.where(logit == 0.0, 0.0, logit)
        bits = tl.where(logit == logit, logit.to(tl.int32, bitcast=True), 0x7FC00000)
        # As integers, bit patterns of negative numbers run backwards: turn them round.
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) + (HIGHEST_ID - token)
        key = tl.where(token < vocab_size, key, NO_KEY)
        out = workspace_ptr + (row * tl.num_programs(1) + chunk) * NUM_RANKS
        for rank in tl.static_range(NUM_RANKS):
            best = tl.max(key, axis=0)
            tl.store(out + rank, best)
            key = tl.where(key == best, NO_KEY, key)


@triton.jit
def _build_block_kernel(
    workspace_ptr,
    line_ptr,
    num_depths_ptr,
    rank_ptr,
    depth_ptr,
    mask_index_ptr,
    draft_tokens_ptr,
    first_mask_id,
    num_keys,
    num_rows,
    max_depth,
    PADDING_TOKEN: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a request and depth: nodes of that depth; the first one also writes masks and padding."""
    request = tl.program_id(0)
    above = tl.program_id(1)
    line = tl.load(line_ptr + request)
    block_row = tl.arange(0, BLOCK_ROWS)
    inside = (block_row > 0) & (block_row < num_rows)
    place = line * num_rows + block_row
    rank = tl.load(rank_ptr + place, mask=inside, other=-1)
    depth = tl.load(depth_ptr + place, mask=inside, other=0)
    out = draft_tokens_ptr + request * (num_rows - 1) + block_row - 1
    if above == 0:
        mask_index = tl.load(mask_index_ptr + place, mask=inside, other=-1)
        fixed = tl.where(mask_index >= 0, first_mask_id + mask_index, PADDING_TOKEN)
        tl.store(out, fixed, mask=inside & (rank < 0))
    if above < tl.load(num_depths_ptr + line):
        index = tl.arange(0, BLOCK_KEYS)
        keys = tl.load(
            workspace_ptr + (request * max_depth + above).to(tl.int64) * num_keys + index,
            mask=index < num_keys,
            other=NO_KEY,
        )
        chosen = tl.zeros([BLOCK_ROWS], tl.int64)
        for wanted in tl.static_range(NUM_RANKS):
            best = tl.max(keys, axis=0)
            chosen = tl.where(rank == wanted, HIGHEST_ID - (best & LOW_BITS), chosen)
            keys = tl.where(keys == best, NO_KEY, keys)
        tl.store(out, chosen, mask=inside & (rank >= 0) & (depth == above + 1))


def shipped() -> list[Shipped]:
    """Logits types, the paper's tree (5 ranks, 52 rows) and the largest, vocabularies to 256k."""
    listed = []
    for num_ranks, num_rows in ((5, 52), (MAX_RANK, 256)):
        for dtype in TRITON_TYPES.values():
            listed.append(
                Shipped(
                    name=f"chunks: {num_ranks} ranks {dtype}",
                    kernel=_rank_chunks_kernel,
                    signature={
                        "logits_ptr": f"*{dtype}",
                        "logits_rows_ptr": "*i32",
                        "line_ptr": "*i32",
                        "num_depths_ptr": "*i32",
                        "workspace_ptr": "*i64",
                        "logits_stride": "i32",
                        "vocab_size": "i32",
                        "max_depth": "i32",
                    },
                    constexprs={"CHUNK": CHUNK, "NUM_RANKS": num_ranks},
                    divisible=("logits_stride", "vocab_size"),
                )
            )
        num_keys = triton.cdiv(256 * 1024, CHUNK) * num_ranks
        listed.append(
            Shipped(
                name=f"block: {num_ranks} ranks {num_rows} rows",
                kernel=_build_block_kernel,
                signature={
                    "workspace_ptr": "*i64",
                    "line_ptr": "*i32",
                    "num_depths_ptr": "*i32",
                    "rank_ptr": "*i32",
                    "depth_ptr": "*i32",
                    "mask_index_ptr": "*i32",
                    "draft_tokens_ptr": "*i64",
                    "first_mask_id": "i32",
                    "num_keys": "i32",
                    "num_rows": "i32",
                    "max_depth": "i32",
                },
                constexprs={
                    "PADDING_TOKEN": PADDING_TOKEN,
                    "NUM_RANKS": num_ranks,
                    "BLOCK_KEYS": triton.next_power_of_2(num_keys),
                    "BLOCK_ROWS": triton.next_power_of_2(num_rows),
                },
            )
        )
    return listed


def _check(
    logits: torch.Tensor,
    logits_rows: torch.Tensor,
    line: torch.Tensor,
    table: TreeTable,
    workspace: torch.Tensor,
    draft_tokens: torch.Tensor,
) -> None:
    device = table.device
    check_tensor("line", line, [None], INT32, device)
    num_requests = len(line)
    check_tensor("logits", logits, [None, None], list(TRITON_TYPES), device, contiguous=False)
    if table.max_rank > MAX_RANK:
        raise ValueError(
            f"table uses {table.max_rank} ranks, expected at most {MAX_RANK} candidates a depth."
        )
    if logits.shape[1] < table.max_rank:
        raise ValueError(
            f"logits has {logits.shape[1]} tokens, expected at least {table.max_rank}: the template's ranks."
        )
    check_tensor("logits_rows", logits_rows, [num_requests, table.max_depth], INT32, device)
    wanted = workspace_shape(num_requests, logits.shape[1], table)
    check_tensor("workspace", workspace, wanted, [torch.int64], device)
    check_tensor("draft_tokens", draft_tokens, [num_requests, table.num_rows - 1], INTEGERS, device)

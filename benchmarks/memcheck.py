"""Small cases of every kernel, each compared with its naive twin: what `compute-sanitizer` watches.

compute-sanitizer --tool memcheck python benchmarks/memcheck.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bita_kernels.accept_tree import accept_tree, accept_tree_naive
from bita_kernels.add_mask_lora import add_mask_lora, make_arrivals
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from bita_kernels.begin_step import begin_step, begin_step_naive
from bita_kernels.build_block import build_block
from bita_kernels.build_block_naive import build_block_naive
from bita_kernels.candidates import Candidates
from bita_kernels.choice_table import ChoiceTable
from bita_kernels.extend_paths import Chains, extend_paths, extend_paths_naive
from bita_kernels.find_copies import MAX_COPIES, CopyState, find_copies
from bita_kernels.find_copies_naive import find_copies_naive
from bita_kernels.move_kv import LayerCaches, move_kv, move_kv_naive
from bita_kernels.rank_tokens import Ranking, rank_tokens
from bita_kernels.rank_tokens_naive import rank_tokens_naive
from bita_kernels.tree_attention import Workspace, tree_attention
from bita_kernels.tree_table import TreeTable
from kernel_cases import Case, Shape
from kernel_providers import attention_config, with_our_arguments

from bita_vllm.tree import Template, TemplateTable
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.search import acceptance_table

REQUESTS, VOCAB_SIZE = 3, 1000
TREES = ([1], [2, 1], [5, 4, 3])
Check = tuple[str, Callable[[], float]]  # a case, and what gives its error


def attention(device: torch.device) -> Iterator[Check]:
    """Head sizes and groups that round and that do not; lengths that end inside a page and a tile."""
    for shape in (
        Shape("D 64, group 3", 9, 3, 64),
        Shape("D 128, group 4", 8, 2, 128),
        Shape("D 80", 2, 2, 80),
    ):
        for rows, context in ((1, 33), (16, 100), (52, 47)):
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            case = Case(shape, context, REQUESTS, rows, dtype, device, 1024)
            for parallel in (False, True):
                kind = "splits side by side" if parallel else "splits in turn"
                yield (
                    f"tree_attention, {shape.name}, R = {rows}, {kind}",
                    lambda case=case, parallel=parallel: attention_error(case, parallel),
                )


def attention_error(case: Case, parallel: bool) -> float:
    """Of the node rows, from float64."""
    config, shape, workspace = attention_config(case), case.shape, None
    if parallel:
        workspace = Workspace.empty(
            config, REQUESTS, case.num_rows, shape.num_q_heads, shape.head_size,
            case.max_model_len, case.device,
        )  # fmt: skip
    return case.error(with_our_arguments(tree_attention, case, config, workspace)(0))


def beginnings(device: torch.device) -> Iterator[Check]:
    """A block cut short, one of the longest line, and a request without; places after the last request."""
    for widths in TREES:
        table = TreeTable.of(TemplateTable(Template.from_widths(widths, 3)), device)
        masks = int(table.num_masks.max())
        for num_masks, finds_masks in ((masks, True), (0, False)):

            def arguments(
                table: TreeTable = table,
                num_masks: int = num_masks,
                finds_masks: bool = finds_masks,
            ) -> dict[str, Any]:
                rows = (table.num_rows - 1, table.num_rows, 1)
                starts = torch.tensor((0, *rows)).cumsum(0)
                num_nodes, last = table.max_nodes, len(table.num_depths) - 1

                def int32(*values: int) -> torch.Tensor:
                    return torch.tensor(values, dtype=torch.int32, device=device)

                def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                    return torch.full((size,), -7, dtype=dtype, device=device)

                outputs = ("line", "first_row", "num_rows", "context_len", "first_mask")
                return {
                    "query_start": starts.int().to(device),
                    "cu_num_logits": int32(0, 2, 4, 5),
                    "slots": torch.arange(REQUESTS, device=device).flip(0),
                    "line_of_slot": int32(0, last, last),
                    "input_ids": torch.arange(sum(rows), dtype=torch.int32, device=device),
                    "positions": 50 + torch.arange(sum(rows), device=device),
                    "table": table,
                    "num_nodes": num_nodes,
                    "num_masks": num_masks,
                    **{name: empty(REQUESTS + 2) for name in outputs},
                    "logits_rows": empty(REQUESTS * (num_nodes + num_masks), torch.int64),
                    "node_tokens": empty(REQUESTS * num_nodes),
                    "node_positions": empty(REQUESTS * num_nodes, torch.int64),
                    "node_slots": empty(REQUESTS * num_nodes, torch.int64),
                    "mask_rows": empty(sum(rows), torch.int64) if finds_masks else None,
                    "num_mask_rows": empty(1, torch.int64) if finds_masks else None,
                }

            names = ("positions", "line", "first_row", "num_rows", "context_len", "first_mask")
            names += ("logits_rows", "node_tokens", "node_positions", "node_slots")
            names += ("mask_rows", "num_mask_rows") if finds_masks else ()
            yield (
                f"begin_step, {widths}{', mask rows' if finds_masks else ''}",
                lambda a=arguments, names=names: different(begin_step, begin_step_naive, a, names),
            )


def paths(device: torch.device) -> Iterator[Check]:
    """Paths from their roots to every depth; few tokens, so that some find a child and some do not."""
    for widths in TREES:
        table = TreeTable.of(TemplateTable(Template.from_widths(widths, 3)), device)

        def error(table: TreeTable = table) -> float:
            generator = torch.Generator().manual_seed(0)
            last, nodes = len(table.num_depths) - 1, table.max_nodes
            line = torch.tensor([last, last, -1], dtype=torch.int32, device=device)
            rows = torch.tensor([table.num_rows, nodes - 1, 1], dtype=torch.int32, device=device)
            tokens = torch.randint(0, 2, (REQUESTS * nodes,), generator=generator).int().to(device)
            positions = torch.arange(REQUESTS * nodes, device=device)
            slots = torch.arange(REQUESTS, device=device).flip(0)
            mine, theirs = (Chains.empty(REQUESTS, nodes, table) for _ in range(2))
            for tensor in (*vars(mine).values(), *vars(theirs).values()):
                tensor.fill_(-7)
            sampled, wrong = None, 0
            for length in range(table.max_depth + 2):
                given = (sampled, length, line, rows, tokens, positions, slots, table)
                extend_paths(*given, mine)
                extend_paths_naive(*given, theirs)
                pairs = zip(vars(mine).values(), vars(theirs).values(), strict=True)
                wrong += any(not torch.equal(a, b) for a, b in pairs)
                drawn = torch.randint(0, 2, (REQUESTS * (length + 1),), generator=generator)
                sampled = drawn.to(device)
            return float(wrong)

        yield f"extend_paths, {widths}", error


def walks(device: torch.device) -> Iterator[Check]:
    """Blocks of every line of a table, whole and cut, and a request without one."""
    for widths in TREES:
        table = TreeTable.of(TemplateTable(Template.from_widths(widths, 3)), device)
        generator = torch.Generator().manual_seed(0)
        rows = table.num_rows
        steps = table.max_depth + 1

        def int32(*values: int, device: torch.device = device) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        tokens = torch.randint(0, 3, (REQUESTS * rows,), generator=generator).to(device)
        targets = torch.randint(0, 3, (REQUESTS * rows,), generator=generator).to(device)

        def arguments(
            table: TreeTable = table, rows: int = rows, steps: int = steps,
            tokens: torch.Tensor = tokens, targets: torch.Tensor = targets,
        ) -> dict[str, Any]:  # fmt: skip
            first = int32(*(i * rows for i in range(REQUESTS)))
            last = len(table.num_depths) - 1
            num_nodes = table.num_nodes[[last, last, 0]]  # the last has no block
            num_nodes[-1] = 1
            empty = {
                name: torch.full(shape, -7, dtype=torch.int32, device=device)
                for name, shape in (
                    ("tokens", (REQUESTS, steps + 2)),
                    ("path", (REQUESTS, steps)),
                    ("num_emitted", (REQUESTS,)),
                    ("next_depths", (REQUESTS,)),
                    ("mask_rows", (REQUESTS, steps - 1)),
                )
            }
            return {
                "target_tokens": targets,
                "row_tokens": tokens,
                "first_target": first,
                "first_row": first,
                "num_rows": int32(rows, max(rows - 1, 1), 1),
                "line": int32(last, last, -1),
                "emitting": torch.ones(REQUESTS, dtype=torch.bool, device=device),
                "first_mask": first + num_nodes,
                "table": table,
                **empty,
            }

        yield (
            f"accept_tree, {widths}",
            lambda a=arguments: different(accept_tree, accept_tree_naive, a),
        )


def rankings(device: torch.device) -> Iterator[Check]:
    """Candidates of masks, from a vocabulary that no chunk divides; fewer and more depths than are wanted."""
    logits = torch.randn(9, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    for num_depths, num_ranks in ((1, 1), (2, 2), (3, 5)):

        def error(num_depths: int = num_depths, num_ranks: int = num_ranks) -> float:
            given = [empty_candidates(num_depths, num_ranks, device) for _ in range(2)]
            rows = torch.arange(REQUESTS * num_depths, device=device).view(REQUESTS, -1) % 9
            ranking = Ranking.of(REQUESTS, VOCAB_SIZE, num_depths, num_ranks, device)
            for function, candidates in zip((rank_tokens, rank_tokens_naive), given, strict=True):
                function(logits, rows, 2, True, ranking, candidates)
            mine, theirs = given
            assert torch.equal(mine.tokens, theirs.tokens)
            return (mine.chance - theirs.chance).abs().max().item()

        yield f"rank_tokens, {num_depths} depths, {num_ranks} ranks", error


def empty_candidates(num_depths: int, num_ranks: int, device: torch.device) -> Candidates:
    """For requests of one depth, of all, and of none."""
    candidates = Candidates.empty(REQUESTS, num_depths, num_ranks, device)
    candidates.depths.copy_(torch.tensor([1, num_depths, 0]))
    candidates.tokens.fill_(-7)
    return candidates


def blocks(device: torch.device) -> Iterator[Check]:
    """Choice of the tree included."""
    acceptance = acceptance_table(None, 3)
    for widths in TREES:
        ladder = Ladder.fixed(Template.from_widths(widths, 3))
        table = TreeTable.of(ladder.table, device)
        choice = ChoiceTable.of(LineChoice(ladder, acceptance, device), table.num_ranks, device)

        def arguments(table: TreeTable = table, choice: ChoiceTable = choice) -> dict[str, Any]:
            candidates = empty_candidates(table.max_depth, table.num_ranks, device)
            candidates.tokens.copy_(
                torch.arange(candidates.tokens.numel()).view_as(candidates.tokens)
            )
            candidates.chance.fill_(0.1)
            return {
                "candidates": candidates,
                "slots": torch.arange(REQUESTS, device=device).flip(0),
                "first_mask_id": VOCAB_SIZE,
                "table": table,
                "choice": choice,
                "set_index": 0,
                "draft_tokens": torch.full((REQUESTS, table.num_rows - 1), -7, device=device),
                "line_of_slot": torch.full((REQUESTS,), -7, dtype=torch.int32, device=device),
            }

        yield (
            f"build_block, {widths}",
            lambda a=arguments: different(
                build_block, build_block_naive, a, ("draft_tokens", "line_of_slot")
            ),
        )


def copies(device: torch.device) -> Iterator[Check]:
    """Texts that end inside a block of places and at its end, in slots of a longer buffer; a first and a later call."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 9, (REQUESTS + 1, 2050), generator=generator).int()
    slots = torch.tensor([3, 0, 2])

    def arguments() -> dict[str, Any]:
        return {
            "token_ids": texts.to(device),
            "slots": slots.to(device),
            "state": CopyState.empty(REQUESTS + 1, texts.shape[1], device),
            "copies": torch.full((REQUESTS, MAX_COPIES), -7, device=device),
            "chances": torch.full((REQUESTS, MAX_COPIES), -7.0, device=device),
        }

    def error() -> float:
        mine, theirs, wrong = arguments(), arguments(), 0.0
        for sizes in ([2046, 0, 1, 1023], [2050, 0, 3, 1026]):
            num_tokens = torch.tensor(sizes, device=device).int()
            find_copies(num_tokens=num_tokens, **mine)
            find_copies_naive(num_tokens=num_tokens, **theirs)
            wrong += not torch.equal(mine["copies"], theirs["copies"])
            wrong += float((mine["chances"] - theirs["chances"]).abs().max())
        return wrong

    yield "find_copies", error


def moves(device: torch.device) -> Iterator[Check]:
    """Accepted rows of two layers, over the ends of pages."""
    caches = torch.randn(
        2, 13, 2, 16, 2 * 64, generator=torch.Generator().manual_seed(0)
    ).bfloat16()

    def arguments() -> dict[str, Any]:
        own = caches.clone().to(device)
        pairs = [layer.transpose(1, 2).split(64, dim=3) for layer in own]
        return {
            "caches": LayerCaches.of(*zip(*pairs, strict=True)),
            "block_table": torch.arange(12, device=device).view(REQUESTS, 4).int(),
            "context_len": torch.tensor([14, 0, 30], device=device).int(),
            "path": torch.tensor([[0, 2, 7, 9], [0, 1, 2, 0], [0, 0, 0, 0]], device=device).int(),
            "num_emitted": torch.tensor([4, 3, 1], device=device).int(),
        }

    def error() -> float:
        mine, theirs = arguments(), arguments()
        move_kv(**mine)
        move_kv_naive(**theirs)
        pairs = zip(mine["caches"].keys, theirs["caches"].keys, strict=True)
        return float(any(not torch.equal(a, b) for a, b in pairs))

    yield "move_kv", error


def deltas(device: torch.device) -> Iterator[Check]:
    """A fused layer of three parts, sizes that nothing divides."""
    parts = torch.tensor([(0, 96), (96, 128), (128, 165)], dtype=torch.int32, device=device)

    def error() -> float:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        rows = torch.full((35,), 10**6, device=device)
        rows[:20] = torch.arange(4, 24, device=device)
        mine = (
            random(32, 165), random(32, 75), random(15, 75) / 9, random(165, 5) / 2, parts, rows,
            torch.tensor([20], device=device),
        )  # fmt: skip
        theirs = tuple(x.clone() for x in mine)
        add_mask_lora(*mine, make_arrivals(len(rows), device))
        add_mask_lora_naive(*theirs)
        return ((mine[0] - theirs[0]).abs().max() / theirs[0].abs().max()).item()

    yield "add_mask_lora", error


def different(
    kernel: Callable[..., None],
    twin: Callable[..., None],
    arguments: Callable[[], dict[str, Any]],
    names: tuple[str, ...] = (
        "tokens",
        "path",
        "num_emitted",
        "next_depths",
        "mask_rows",
    ),
) -> float:
    """1 if an output of the kernel is not its twin's."""
    mine, theirs = arguments(), arguments()
    kernel(**mine)
    twin(**theirs)
    return float(any(not torch.equal(mine[name], theirs[name]) for name in names))


KINDS = (attention, beginnings, walks, paths, rankings, blocks, copies, moves, deltas)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tolerance, wrong = (2e-2 if device.type == "cuda" else 1e-4), 0
    for kind in KINDS:
        for name, error_of in kind(device):
            error = error_of()
            wrong += error > tolerance
            print(f"{name}: {error:.1e}{' WRONG' if error > tolerance else ''}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    sys.exit(f"{wrong} cases differ from their twins" if wrong else 0)


if __name__ == "__main__":
    main()

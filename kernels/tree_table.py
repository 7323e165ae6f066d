"""The template table on the device: what each row of a step block is, for every line of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

COLUMNS = ("num_nodes", "parent", "rank", "depth", "mask_index", "candidate_rows")


@dataclass(frozen=True)
class TreeTable:
    """Lines of one template, or of several one after another, padded to R rows.

    Line D of a template is the block of a request that has candidates for D depths.

    Attributes:
        num_depths: `[lines]` int32, depths of draft nodes of the line.
        num_nodes: `[lines]` int32, root and draft nodes of the line; they come first.
        num_masks: `[lines]` int32, mask rows of the line; they follow the nodes.
        parent: `[lines, R]` int32, -1 for the root and in padding.
        rank: `[lines, R]` int32, candidate rank of a draft node, -1 elsewhere.
        depth: `[lines, R]` int32, distance from the root.
        mask_index: `[lines, R]` int32, index of a mask row in its group, -1 elsewhere.
        candidate_rows: `[lines, max_nodes, max_depth]` int32: after a walk that stopped at node v, the row
            that predicts depth d+1 of the next block, or -1; those that are not -1 are a prefix.
        ancestor_bits: `[lines, R, W]` int32, W = R / 32 rounded up: bit j % 32 of word j // 32 says that the
            row sees row j of its own block: itself and its ancestors; none in padding.
        max_rank: candidates needed of one mask row; also the rank of copied tokens.
        num_ranks: of candidates: those of masks and, where a template copies, one of copied tokens after them.
    """

    num_depths: torch.Tensor
    num_nodes: torch.Tensor
    num_masks: torch.Tensor
    parent: torch.Tensor
    rank: torch.Tensor
    depth: torch.Tensor
    mask_index: torch.Tensor
    candidate_rows: torch.Tensor
    ancestor_bits: torch.Tensor
    max_rank: int
    num_ranks: int

    @classmethod
    def of(cls, table: Any, device: torch.device | str) -> TreeTable:
        """Copy a host table with these attributes (`bita_vllm.tree.TemplateTable`) to the device.

        Raises:
            ValueError: the attributes do not fit together, or there are no draft nodes.
        """
        columns = {name: torch.tensor(getattr(table, name), dtype=torch.int32) for name in COLUMNS}
        lines, rows = columns["parent"].shape
        max_nodes, max_depth = columns["candidate_rows"].shape[1:]
        if max_depth == 0 or max_nodes < 2:
            raise ValueError("table has no draft nodes, expected at least one: nothing to verify.")
        expected: dict[str, tuple[int, ...]] = {
            "num_nodes": (lines,),
            "candidate_rows": (lines, max_nodes, max_depth),
            **dict.fromkeys(("parent", "rank", "depth", "mask_index"), (lines, rows)),
        }
        for name, shape in expected.items():
            if columns[name].shape != shape:
                raise ValueError(
                    f"table.{name} has shape {list(columns[name].shape)}, expected {list(shape)} to fit table.parent."
                )
        seen = torch.tensor(table.ancestors, dtype=torch.bool)
        if seen.shape != (lines, rows, rows):
            raise ValueError(
                f"table.ancestors has shape {list(seen.shape)}, expected {[lines, rows, rows]} to fit table.parent."
            )
        columns["ancestor_bits"] = packed_bits(seen)
        is_node = columns["rank"] >= 0
        is_mask = columns["mask_index"] >= 0
        columns["num_masks"] = num_masks = is_mask.sum(dim=1, dtype=torch.int32)
        place = torch.arange(rows) - columns["num_nodes"][:, None]
        if not torch.equal(is_mask, (place >= 0) & (place < num_masks[:, None])):
            raise ValueError(
                "table.mask_index has mask rows apart, expected them to follow the nodes of their line."
            )
        columns["num_depths"] = torch.where(is_node, columns["depth"], 0).amax(dim=1)
        return cls(
            **{name: column.to(device) for name, column in columns.items()},
            max_rank=table.max_rank,
            num_ranks=int(columns["rank"].max()) + 1,
        )

    @property
    def num_rows(self) -> int:
        """R of the longest line."""
        return self.parent.shape[1]

    @property
    def max_nodes(self) -> int:
        """Root and draft nodes of the longest line."""
        return self.candidate_rows.shape[1]

    @property
    def max_depth(self) -> int:
        """Depth of the deepest draft node."""
        return self.candidate_rows.shape[2]

    @property
    def has_copies(self) -> bool:
        """Whether a template copies."""
        return self.num_ranks > self.max_rank

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.parent.device


def packed_bits(
    # [..., n] bool
    flags: torch.Tensor,
) -> torch.Tensor:
    """`[..., n / 32 rounded up]` int32, the first flag in the lowest bit."""
    words = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 32)).unflatten(-1, (-1, 32))
    values = (words.long() << torch.arange(32)).sum(dim=-1)
    return torch.where(values >= 2**31, values - 2**32, values).int()

"""Tree templates: the shape of a step block, as data (NumPy only).

A template lists the R rows of a step block: the root, the draft nodes, the mask groups. Parents always
come before their children, so every prefix of a block is a valid block: rows that were cut off (token
budget, max_model_len) are simply nodes and mask groups that are absent.

Source of the tree with a branching by depth (5,4,3): BiTA (arXiv 2401.12522) section 3.2. The rest is our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bita_vllm.system.atomic_write import write_text
from bita_vllm.system.errors import UserError
from bita_vllm.system.file_schemas import MAX_ROWS, TemplateSchema, beyond_masks, check, read_json
from bita_vllm.tree.shape import COPY_RANK, TreeShape

NO_BLOCK = -1  # in place of a line of the template table: a request without a block


class TemplateError(UserError):
    """A tree template that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Template:
    """Rows of a step block: root first, then draft nodes, then mask groups.

    The draft nodes that masks fill come first. A chain of copied tokens, from the root down, may follow them.

    Attributes:
        parent: `[R]` int32, row of the parent, -1 for the root.
        rank: `[R]` int32, candidate rank a draft node takes (0 is the most likely), COPY_RANK for a copied token;
            -1 elsewhere.
        mask_index: `[R]` int32, index of a mask row within its group; -1 for the root and draft nodes.
    """

    parent: np.ndarray
    rank: np.ndarray
    mask_index: np.ndarray

    @classmethod
    def build(
        cls, nodes: Sequence[tuple[int, int]], groups: Mapping[int, int], copies: int = 0
    ) -> Template:
        """Make a template from draft nodes and mask groups.

        Args:
            nodes: (parent row, candidate rank) of draft node rows 1, 2, ...; the root is row 0.
            groups: row of the root or of a draft node -> length of its mask group.
            copies: length of the chain of copied tokens.

        Raises:
            TemplateError: a parent that comes later, two children with one rank, too many rows.
        """
        parent, rank, mask_index = [-1], [-1], [-1]
        for row, (node_parent, node_rank) in enumerate(nodes, start=1):
            if not 0 <= node_parent < row:
                raise TemplateError(
                    f"Tree template: node {row} has parent {node_parent}, "
                    f"but a parent must be an earlier row (0 to {row - 1}, 0 is the root)."
                )
            if node_rank < 0:
                raise TemplateError(
                    f"Tree template: node {row} has rank {node_rank}; ranks start at 0."
                )
            parent.append(node_parent)
            rank.append(node_rank)
            mask_index.append(-1)
        if len(set(nodes)) != len(nodes):
            raise TemplateError(
                "Tree template: two nodes share both parent and rank; each candidate may appear once."
            )
        for index in range(copies):
            parent.append(0 if index == 0 else len(parent) - 1)
            rank.append(COPY_RANK)
            mask_index.append(-1)
        num_nodes = len(parent)
        if not groups.get(0) and not copies:
            raise TemplateError(
                "Tree template: the root needs a mask group, or a request would never get candidates; "
                'add "0" to the groups.'
            )
        for row, length in sorted(groups.items()):
            if not 0 <= row < num_nodes:
                raise TemplateError(
                    f"Tree template: mask group under row {row}, but the root and nodes are rows 0 to {num_nodes - 1}."
                )
            for index in range(length):
                parent.append(row if index == 0 else len(parent) - 1)
                rank.append(-1)
                mask_index.append(index)
        if len(parent) > MAX_ROWS:
            raise TemplateError(
                f"Tree template has {len(parent)} rows; at most {MAX_ROWS} are supported, use a smaller tree."
            )
        return cls(*(np.array(column, dtype=np.int32) for column in (parent, rank, mask_index)))

    @classmethod
    def from_widths(cls, widths: Sequence[int], num_masks: int) -> Template:
        """The paper's tree, from its branching: the number of candidates at each depth.

        At each depth only the top candidate of the depth above has children. A full mask group of `num_masks` rows
        hangs under the root and every node.
        """
        if not widths or any(width < 1 for width in widths):
            raise TemplateError(
                f"Tree widths {list(widths)}: each depth needs at least one candidate, as in '5,4,3'."
            )
        if len(widths) > num_masks:
            raise TemplateError(
                f"Tree widths {list(widths)} have {len(widths)} depths, but the adapter has {num_masks} mask tokens, "
                f"so at most {num_masks} depths can be drafted."
            )
        # The chain of top candidates first: the likeliest path then lies in its KV slots already.
        nodes = [(depth, 0) for depth in range(len(widths))]
        for depth, width in enumerate(widths):
            nodes += [(depth, rank) for rank in range(1, width)]
        return cls.build(nodes, dict.fromkeys(range(len(nodes) + 1), num_masks))

    @classmethod
    def of_shape(cls, shape: TreeShape) -> Template:
        """Nodes of the likeliest path first: they then lie in their KV slots already; the others by depth."""
        depths, on_path = shape.depths(), [True]
        for parent, rank in zip(shape.parent[1:], shape.rank[1:], strict=True):
            on_path.append(on_path[parent] and rank == 0)
        order = sorted(
            range(len(depths)), key=lambda node: (not on_path[node], depths[node], shape.rank[node])
        )
        row = {node: i for i, node in enumerate(order)}
        return cls.build(
            [(row[shape.parent[node]], shape.rank[node]) for node in order[1:]],
            {row[node]: length for node, length in enumerate(shape.group) if length},
        )

    @classmethod
    def load(cls, path: str | Path) -> Template:
        """Read `{"nodes": [[parent, rank], ...], "groups": {"0": 3, ...}}`."""
        try:
            return cls.from_dict(read_json(Path(path)))
        except TemplateError:
            raise
        except (OSError, ValueError) as error:
            raise TemplateError(
                f"Tree template file {path} cannot be read ({type(error).__name__}: {error}); "
                'expected JSON like {"nodes": [[0, 0], [0, 1], [1, 0]], "groups": {"0": 3, "1": 2}}.'
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the JSON form that `load` reads, whole. Raises TemplateError."""
        try:
            write_text(path, json.dumps(self.to_dict()) + "\n")
        except OSError as error:
            raise TemplateError(
                f"The tree template could not be written to {path} ({error})."
            ) from error

    @classmethod
    def from_dict(cls, content: Any) -> Template:
        """From the JSON form. Raises TemplateError or SchemaError."""
        return cls.of_schema(check(TemplateSchema, content))

    @classmethod
    def of_schema(cls, form: TemplateSchema) -> Template:
        """From the checked JSON form. Raises TemplateError."""
        groups = {int(row): length for row, length in form.groups.items()}
        return cls.build(form.nodes, groups, form.copies)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        ranked = range(1, self.num_nodes - self.num_copies)
        nodes = [[int(self.parent[row]), int(self.rank[row])] for row in ranked]
        groups = {str(row): int(length) for row, length in enumerate(self.group_length) if length}
        copies = {"copies": self.num_copies} if self.num_copies else {}
        return {"nodes": nodes, "groups": groups, **copies}

    @property
    def num_rows(self) -> int:
        """R: root, draft nodes and mask rows."""
        return len(self.parent)

    @property
    def width(self) -> int:
        """R-1: the rows less the root, as vLLM counts draft tokens."""
        return self.num_rows - 1

    @cached_property
    def shape(self) -> TreeShape:
        """Its nodes and the lengths of their mask groups alone, node for node."""
        nodes = self.num_nodes
        return TreeShape(
            tuple(self.parent[:nodes].tolist()),
            tuple(self.rank[:nodes].tolist()),
            tuple(self.group_length.tolist()),
        )

    @cached_property
    def num_nodes(self) -> int:
        """Root and draft nodes: the rows whose tokens may be emitted."""
        return int((self.mask_index < 0).sum())

    @cached_property
    def depth(self) -> np.ndarray:
        """`[R]` int32, distance from the root; the row's position is the root's plus this."""
        depth = np.zeros(self.num_rows, dtype=np.int32)
        for row in range(1, self.num_rows):
            depth[row] = depth[self.parent[row]] + 1
        return depth

    @classmethod
    def from_text(cls, text: str, num_masks: int) -> Template | None:
        """The template of a branching such as '5,4,3' or of a file, for k = `num_masks` masks; None if it is neither.

        Raises:
            TemplateError: the template is malformed, or has more depths or longer mask groups than the adapter masks.
        """
        widths = [part.strip() for part in text.split(",")]
        if all(part.isdigit() for part in widths):
            template = cls.from_widths([int(part) for part in widths], num_masks)
        elif Path(text).is_file():
            template = cls.load(text)
        else:
            return None
        if beyond := beyond_masks(template.num_masks, template.mask_depth, num_masks):
            raise TemplateError(
                f"Tree {text!r} has {beyond}; use a tree of shorter groups and fewer depths."
            )
        return template

    @cached_property
    def num_copies(self) -> int:
        """Length of the chain of copied tokens."""
        return int((self.rank == COPY_RANK).sum())

    @cached_property
    def max_depth(self) -> int:
        """Deepest draft node."""
        return int(self.depth[: self.num_nodes].max())

    @cached_property
    def mask_depth(self) -> int:
        """Deepest draft node that masks fill."""
        return int(self.depth[: self.num_nodes - self.num_copies].max())

    @cached_property
    def max_rank(self) -> int:
        """Candidates needed of one mask row."""
        return int(self.rank[: self.num_nodes - self.num_copies].max()) + 1

    @cached_property
    def group_length(self) -> np.ndarray:
        """`[num_nodes]` int32, length of the mask group under each node, 0 for none."""
        length = np.zeros(self.num_nodes, dtype=np.int32)
        for first in np.flatnonzero(self.mask_index == 0):
            end = first + 1
            while end < self.num_rows and self.mask_index[end] > 0:
                end += 1
            length[self.parent[first]] = end - first
        return length

    @property
    def num_masks(self) -> int:
        """Length of the longest mask group."""
        return int(self.group_length.max())

    @cached_property
    def ancestors(self) -> np.ndarray:
        """`[R, R]` bool, row i sees row j of its own block: j is i or an ancestor of i."""
        seen = np.eye(self.num_rows, dtype=bool)
        for row in range(1, self.num_rows):
            seen[row] |= seen[self.parent[row]]
        return seen

    @cached_property
    def candidate_rows(self) -> np.ndarray:
        """`[num_nodes, num_masks]` int32: mask row that predicts depth d+1 of the next block, or -1.

        Entry (v, d) holds for a walk that stopped at node v: v's own group where it is long enough, else
        the nearest ancestor's whose group reaches that far (left-over candidates: a mask's prediction for
        a position that is still ahead). The entries that are not -1 are a prefix of each line.
        """
        rows = np.full((self.num_nodes, self.num_masks), -1, dtype=np.int32)
        first_mask = {
            int(self.parent[row]): int(row) for row in np.flatnonzero(self.mask_index == 0)
        }
        for node in range(self.num_nodes):
            ancestor = node
            while ancestor >= 0:
                shift = self.depth[node] - self.depth[ancestor]
                for d in range(self.group_length[ancestor] - shift):
                    if rows[node, d] < 0:
                        rows[node, d] = first_mask[ancestor] + shift + d
                ancestor = int(self.parent[ancestor])
        return rows

    def restrict(self, num_depths: int) -> Template:
        """The template without masks' draft nodes deeper than `num_depths`, and without their mask groups."""
        kept = self.kept_nodes(num_depths).tolist()
        new_row = {old: new for new, old in enumerate(kept)}
        ranked = kept[1 : len(kept) - self.num_copies]
        return Template.build(
            [(new_row[int(self.parent[row])], int(self.rank[row])) for row in ranked],
            {new_row[row]: int(self.group_length[row]) for row in kept},
            self.num_copies,
        )

    def kept_nodes(self, num_depths: int) -> np.ndarray:
        """`[nodes of restrict(num_depths)]` rows of its nodes in this template, in its order."""
        is_copy = self.rank[: self.num_nodes] == COPY_RANK
        return np.flatnonzero(is_copy | (self.depth[: self.num_nodes] <= num_depths))

    def describe(self) -> str:
        """For logs: nodes by depth, mask rows, total."""
        num_ranked = self.num_nodes - self.num_copies
        by_depth = ",".join(map(str, np.bincount(self.depth[1:num_ranked])[1:]))
        copies = f"{self.num_copies} copies, " if self.num_copies else ""
        return (
            f"{self.num_rows} rows: {num_ranked - 1} draft nodes ({by_depth} by depth), {copies}"
            f"{self.num_rows - self.num_nodes} mask rows in {int((self.group_length > 0).sum())} groups"
        )


class TemplateTable:
    """The blocks that templates can take, one for each number of depths that have candidates, padded alike.

    A line is one of these blocks: `first_line[t] + D` (D from 0 to `mask_depths[t]`) is `templates[t].restrict(D)`.
    D = 0 is the block of a request whose masks gave no candidates. Blocks of several templates may meet in a step, and
    a walk in a block of one template may give the candidates of a block of another.

    Attributes:
        template: the largest.
        first_line, mask_depths: `[T]` int64, by template.
        max_rank: candidates needed of one mask row, over all templates. A node for a copied token has it for a rank:
            the column after the masks' own.
        num_rows: `[lines]` int32.
        num_nodes: `[lines]` int32.
        depth, parent, rank, mask_index: `[lines, R]` int32 (0, -1, -1, -1 in padding).
        ancestors: `[lines, R, R]` bool.
        candidate_rows: `[lines, max_nodes, max_depth]` int32, as `Template.candidate_rows`, -1 in padding.
    """

    def __init__(self, *templates: Template) -> None:
        self.template = max(templates, key=lambda template: template.num_rows)
        self.mask_depths = np.array([t.mask_depth for t in templates])
        self.first_line = np.cumsum(self.mask_depths + 1) - self.mask_depths - 1
        variants = [t.restrict(depths) for t in templates for depths in range(t.mask_depth + 1)]
        lines, rows = len(variants), self.template.num_rows
        self.max_depth = max(template.max_depth for template in templates)
        self.max_rank = max(template.max_rank for template in templates)
        self.max_nodes = max(template.num_nodes for template in templates)
        self.num_rows = np.array([v.num_rows for v in variants], dtype=np.int32)
        self.num_nodes = np.array([v.num_nodes for v in variants], dtype=np.int32)
        self.depth = np.zeros((lines, rows), dtype=np.int32)
        self.parent = np.full((lines, rows), -1, dtype=np.int32)
        self.rank = np.full((lines, rows), -1, dtype=np.int32)
        self.mask_index = np.full((lines, rows), -1, dtype=np.int32)
        self.ancestors = np.zeros((lines, rows, rows), dtype=bool)
        self.candidate_rows = np.full((lines, self.max_nodes, self.max_depth), -1, dtype=np.int32)
        for line, variant in enumerate(variants):
            n = variant.num_rows
            self.depth[line, :n] = variant.depth
            self.parent[line, :n] = variant.parent
            self.rank[line, :n] = np.where(variant.rank == COPY_RANK, self.max_rank, variant.rank)
            self.mask_index[line, :n] = variant.mask_index
            self.ancestors[line, :n, :n] = variant.ancestors
            used = min(variant.num_masks, self.max_depth)
            self.candidate_rows[line, : variant.num_nodes, :used] = variant.candidate_rows[:, :used]

    def template_of(self, line: Any) -> Any:
        """Which template a line, or each of several, is a block of."""
        return np.searchsorted(self.first_line, line, side="right") - 1

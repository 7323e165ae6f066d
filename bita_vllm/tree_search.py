"""The best template within a row budget, for given acceptance statistics.

Greedy on expected accepted length per row. The decoding process is a Markov chain: where the walk stops
decides which mask rows give the next block's candidates, so a mask group is worth what it saves the next
step (DESIGN section 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bita_vllm.tree import Template, TemplateError

# P(rank r of mask j is the token | the tokens before it were accepted), [k][ranks], for adapters that
# bring no statistics. Not measured rank by rank: chosen so that the lengths measured for the first
# adapter on MT-Bench come out (chain of 3 1.445, 3/2/1 1.686, 5/4/3 1.826), decaying smoothly behind.
DEFAULT_ACCEPTANCE = (
    (0.37, 0.12, 0.07, 0.045, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
    (0.20, 0.09, 0.055, 0.04, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
    (0.15, 0.07, 0.045, 0.035, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01),
)


def best_template(
    num_rows: int, num_masks: int, acceptance: Sequence[Sequence[float]] | None = None
) -> Template:
    """Grow the template, best gain per row first, until the budget is used up or nothing gains.

    Args:
        num_rows: row budget R.
        num_masks: k of the adapter: longest mask group, deepest node.
        acceptance: `[k][ranks]` conditional acceptance of each mask's candidates, by rank.

    Raises:
        TemplateError: the budget holds no root, node and mask row, or the statistics are malformed.
    """
    if num_rows < 3:
        raise TemplateError(
            f"A row budget of {num_rows} is too small: root, one draft node and one mask row need 3 rows "
            "(num_speculative_tokens 2); raise it."
        )
    table = _checked(acceptance, num_masks)
    draft = _Draft(groups={0: 1})
    best = draft.expected_length(table)
    while True:
        grown = [d for d in draft.successors(num_masks, len(table[0])) if d.num_rows <= num_rows]
        scored = [
            ((d.expected_length(table) - best) / (d.num_rows - draft.num_rows), d) for d in grown
        ]
        gain, winner = max(scored, key=lambda pair: pair[0], default=(0.0, draft))
        if gain <= 1e-9:
            return draft.template()
        draft, best = winner, winner.expected_length(table)


def expected_length(template: Template, acceptance: Sequence[Sequence[float]]) -> float:
    """Expected accepted length of a template in the long run (tokens per step and request)."""
    nodes = [
        (int(template.parent[row]), int(template.rank[row])) for row in range(1, template.num_nodes)
    ]
    groups = {row: int(n) for row, n in enumerate(template.group_length) if n}
    return _Draft(nodes, groups).expected_length(_checked(acceptance, template.num_masks))


def _checked(acceptance: Sequence[Sequence[float]] | None, num_masks: int) -> list[list[float]]:
    """`[num_masks][ranks]`; the default table repeats its last mask where k is larger."""
    if acceptance is None:
        rows = [
            list(DEFAULT_ACCEPTANCE[min(j, len(DEFAULT_ACCEPTANCE) - 1)]) for j in range(num_masks)
        ]
    else:
        rows = [[float(p) for p in row] for row in acceptance]
    if len(rows) < num_masks or any(
        len(row) != len(rows[0]) or not row or min(row) < 0 or sum(row) > 1 + 1e-6 for row in rows
    ):
        raise TemplateError(
            f"Acceptance statistics must be {num_masks} equally long lists of probabilities by rank, each summing "
            f"to at most 1; got {len(rows)} lists. Run 'bita eval' to make them."
        )
    return rows


@dataclass
class _Draft:
    """A template that is being grown: (parent, rank) of each node, group length by row."""

    nodes: list[tuple[int, int]] = field(default_factory=list)
    groups: dict[int, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return 1 + len(self.nodes) + sum(self.groups.values())

    def template(self) -> Template:
        return Template.build(self.nodes, self.groups)

    def depths(self) -> list[int]:
        depths = [0]
        for parent, _ in self.nodes:
            depths.append(depths[parent] + 1)
        return depths

    def successors(self, num_masks: int, num_ranks: int) -> list[_Draft]:
        """One longer mask group; one more node with or without a group; a deeper node with all groups longer.

        The last makes depths reachable that pay only once many groups are long enough for them.
        """
        found = []
        depths = self.depths()
        for row, depth in enumerate(depths):
            for length in range(self.groups.get(row, 0) + 1, num_masks + 1):
                found.append(_Draft(self.nodes, {**self.groups, row: length}))
            rank = sum(parent == row for parent, _ in self.nodes)
            if depth < num_masks and rank < num_ranks:
                nodes = [*self.nodes, (row, rank)]
                for length in range(num_masks + 1):
                    extra = {len(nodes): length} if length else {}
                    found.append(_Draft(nodes, {**self.groups, **extra}))
                    if depth == max(depths) and length > depth:
                        longer = {row: max(n, length) for row, n in self.groups.items()}
                        found.append(_Draft(nodes, {**longer, **extra}))
                        found.append(_Draft(nodes, {**longer, len(nodes): 1}))
        return found

    def sources(self) -> list[tuple[int, ...]]:
        """For a walk that stops at each row: mask index that gives the candidates of each next depth."""
        found: list[tuple[int, ...]] = []
        for row in range(len(self.nodes) + 1):
            own = tuple(range(self.groups.get(row, 0)))
            left_over = found[self.nodes[row - 1][0]][1:] if row else ()
            if row and len(left_over) > len(own):
                own += left_over[len(own) :]
            found.append(own)
        return found

    def expected_length(self, acceptance: list[list[float]]) -> float:
        sources, depths = self.sources(), self.depths()
        states = [(), *sorted(set(sources) - {()})]
        index = {state: i for i, state in enumerate(states)}
        emitted, moves = [], []
        for state in states:
            reach, stop = [1.0], [1.0]
            for row, (parent, rank) in enumerate(self.nodes, start=1):
                depth = depths[row]
                p = (
                    reach[parent] * acceptance[state[depth - 1]][rank]
                    if depth <= len(state)
                    else 0.0
                )
                reach.append(p)
                stop.append(p)
                stop[parent] -= p
            emitted.append(sum(reach))
            move = [0.0] * len(states)
            for row, p in enumerate(stop):
                move[index[sources[row]]] += p
            moves.append(move)
        share = [1.0 / len(states)] * len(states)
        for _ in range(40):
            share = [
                sum(share[i] * moves[i][j] for i in range(len(states))) for j in range(len(states))
            ]
        return sum(s * e for s, e in zip(share, emitted, strict=True))

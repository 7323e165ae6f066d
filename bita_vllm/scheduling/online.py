"""Rows by load while serving: the ladder's table follows the acceptance and the cost that are seen.

The ladder says what was expected; every step that serves says what came. Both are kept as counts that
fade, and now and then, off the hot path, the table is derived anew from what they come to. Evidence that is no
longer renewed fades back to what the ladder expects, so a width that lost is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bita_vllm.scheduling.accounts import Accounts
from bita_vllm.scheduling.promise import Promise
from bita_vllm.scheduling.seen_acceptance import FADE, PRIOR_BLOCKS, Acceptance, Copying, lines_of
from bita_vllm.scheduling.seen_cost import SeenCost
from bita_vllm.tree import NO_BLOCK
from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder, describe_ranges, ranges_of
from bita_vllm.tree.ladder_search import (
    MIN_GAIN,
    PLAIN,
    fastest,
    gains_over_plain,
    rows_of,
    step_seconds,
)
from bita_vllm.tree.search import evaluate, scaled
from bita_vllm.tree.step_cost import MeasuredCost, StepCost

REVIEW_SECONDS = 10.0
PROBE_STEPS = 16  # of plain decoding, to tell rows that cost more from a slower machine
SURE = 2.0  # standard errors: within, a gain may be a loss
LENGTH_DEVIATION = 0.5  # standard deviation of a block's accepted length, relative to its mean


class WidthPolicy:
    """The best table from batch size to width, by what was seen so far.

    Drafts give way to plain decoding only if even the upper end of their gain's interval is a loss. Where it is not
    sure that they gain, or where they take longer than expected, and no plain step was seen lately, a few plain steps
    are run in between. Only these tell rows that cost more from a machine that is slower at everything.
    """

    def __init__(
        self,
        ladder: Ladder,
        # [ages, 2, k, ranks]
        acceptance: np.ndarray,
        cost: StepCost,
        max_num_seqs: int,
        *,
        padded: bool = False,
        most_requests: Mapping[int, int] | None = None,
        context: float = 512.0,
        most_rows: float = np.inf,
        now: float | None = None,
    ) -> None:
        """
        Args:
            ladder: templates, and the table to start with. Widths that it does not name are not used.
            acceptance: the adapter's statistics.
            cost: that the ladder was chosen by.
            padded: blocks always have R rows (GPU).
            most_rows: of a step with blocks, over all requests.
            most_requests: width -> the most requests that it may be chosen for (GPU: beyond, it has no CUDA graph);
                None: no bound.
            now: seconds on a clock of one's own (the simulator's), otherwise this machine's.
        """
        sets = ladder.template_sets
        self._widths = [*ladder.widths, PLAIN_WIDTH]  # by template, PLAIN last
        named = {width for *_, width in ladder.batch_sizes}
        usable = np.array([width in named for width in ladder.widths])
        self._plain_is_usable = PLAIN_WIDTH in named or not padded
        self._drafts = [one.first.shape for one in sets]
        self._gains = np.array([one.gain for one in sets])  # by choosing among the trees of a width
        self._table: list[int] = ladder.lookup(max_num_seqs).tolist()
        self._no_drafts = [PLAIN_WIDTH] * len(self._table)
        self._probe = 0  # plain steps still to see
        self._may_lose = False  # for all that is known, drafts may be slower than plain decoding at the last load
        self._num_requests = 1  # of the last step
        run = evaluate(self._drafts, acceptance)
        rows = rows_of(sets, run.rows, padded)
        sizes = range(1, max_num_seqs + 1)
        bounds = most_requests or {}
        may_have = [np.array(sizes) <= bounds.get(width, max_num_seqs) for width in ladder.widths]
        # [T, N] whether a batch size may have the template
        self._usable = usable[:, None] & (np.outer(rows, sizes) <= most_rows) & np.array(may_have)
        self.acceptance = Acceptance(ladder, acceptance)
        self._copying = Copying(ladder, run.accepted_length * self._gains)
        expected = np.vstack(step_seconds(cost, rows, sizes, context))
        self.cost = SeenCost(expected)
        self._promise = Promise(run.accepted_length * self._gains, expected)
        self.broken_promise: str | None = None  # of the last review, a sentence for the log
        self._template_of_line = np.repeat(np.arange(len(sets)), [lines_of(one) for one in sets])
        self._rows = rows
        self._accounts = None if padded else Accounts(ladder.table)
        self._set_prices(self.cost.expected)
        self._reviewed = time.monotonic() if now is None else now

    @property
    def lookup(self) -> list[int]:
        """`[max_num_seqs + 1]` width by number of requests in a step."""
        return self._no_drafts if self._probe else self._table

    @property
    def resting(self) -> list[str]:
        """Requests of the last step whose next block is not worth its rows."""
        return [] if self._accounts is None else self._accounts.resting

    def describe(self) -> str:
        """For logs: rows by batch size."""
        return describe_ranges(ranges_of(self._table[1:]))

    def saw_step(
        self,
        requests: Sequence[str],
        # of each request, -1 without a block; empty in plain decoding
        lines: Sequence[int],
        # row where its walk stopped
        last_nodes: Sequence[int],
        seconds: float | None,
        cpu_seconds: float | None = None,
    ) -> None:
        """Take note of a step: its blocks, and its seconds, None if it did other work too.

        Args:
            cpu_seconds: of all threads that computed it; None if they are not this process's.
        """
        if not requests:
            return
        self._num_requests = num_requests = len(requests)
        line = np.asarray(lines) if len(lines) else np.full(num_requests, NO_BLOCK)
        node = np.asarray(last_nodes) if len(lines) else np.zeros_like(line)
        has_block = line >= 0
        self.acceptance.add(line, node)
        if self._accounts is not None:
            self._accounts.settle(requests, line, node, self._price[num_requests])
        used = self._template_of_line[line[has_block]]
        self._copying.add(used, line[has_block], node[has_block])
        template = int(used[0]) if len(used) else PLAIN
        share = len(used) / num_requests if len(used) else 1.0
        # Padded, a step of blocks and single rows is another kind of step: none for a CUDA graph.
        if (used != template).any() or (share < 1 and self._accounts is None):
            return
        if seconds is not None:
            self.cost.add(template, num_requests, seconds, share, cpu_seconds)
        if template == PLAIN and self._probe:
            self._probe -= 1

    def review(self, now: float | None = None) -> bool:
        """Derive the table anew if it is time. Return whether it changed."""
        now = time.monotonic() if now is None else now
        self.broken_promise = None
        if now - self._reviewed < REVIEW_SECONDS:
            return False
        self._reviewed = now
        run = evaluate(self._drafts, self.acceptance.estimate())
        lengths = self._copying.with_copies(run.accepted_length * self._gains)
        seconds, errors = self.cost.seconds(), self.cost.errors()
        n = self._num_requests
        template = self._widths.index(self._table[n])
        self.broken_promise = self._promise.what_came(
            now, template if self._table[n] else PLAIN, n, lengths, seconds
        )
        of_length = LENGTH_DEVIATION / np.sqrt(self.acceptance.num_blocks + PRIOR_BLOCKS)
        doubt = SURE * np.sqrt(errors[:-1] ** 2 + errors[-1] ** 2 + of_length**2)  # [T, N]
        changed = self._choose(gains_over_plain(lengths, seconds[:-1], seconds[-1]), doubt)
        if self._plain_is_usable and (
            self.cost.needs_plain_steps(self._num_requests) or self._may_lose
        ):
            self._probe = PROBE_STEPS
        self.acceptance.fade()
        self._copying.fade()
        self.cost.fade(FADE)
        self._set_prices(seconds)
        return changed

    def _choose(
        self,
        # [T, N] tokens a second over plain decoding's
        gains: np.ndarray,
        # [T, N] how far they may be off, relative to them
        doubt: np.ndarray,
    ) -> bool:
        min_gain = MIN_GAIN if self._plain_is_usable else -1.0
        gains = np.where(self._usable, gains, 0.0)
        best, gain = fastest(gains, min_gain)
        current = np.array([self._widths.index(width) for width in self._table[1:]])
        every, plain = np.arange(len(current)), len(gains)
        kept = np.vstack([gains, np.ones_like(gain)])[current, every]
        kept_doubt = np.vstack([doubt, np.zeros_like(gain)])[current, every]
        change = (best != current) & (gain > kept * (1 + MIN_GAIN))
        loses = kept * (1 + kept_doubt) < 1.0
        change = np.where((best == PLAIN) & (current != plain), loses, change)
        for i in np.flatnonzero(change).tolist():
            self._table[i + 1] = self._widths[int(best[i])]
        now = self._num_requests
        self._may_lose = bool(
            self._table[now] != PLAIN_WIDTH
            and kept[now - 1] * (1 - kept_doubt[now - 1]) < 1.0
            and not self.cost.knows_plain_steps(now)
        )
        return bool(change.any())

    def _set_prices(
        self,
        # [T+1, N] of a step, plain decoding last
        seconds: np.ndarray,
    ) -> None:
        """Tokens that a row of a block has to bring, by number of requests: what it costs of a plain step."""
        template = [self._widths.index(width) for width in self._table[1:]]
        of_step = seconds[template, np.arange(seconds.shape[1])] / seconds[PLAIN] - 1
        self._price = np.append(0.0, of_step / np.append(self._rows - 1, 1.0)[template])


def policy_of(
    ladder: Ladder,
    # [ages, 2, k, ranks] the adapter's
    acceptance: np.ndarray,
    max_num_seqs: int,
    padded: bool,
    most_requests: Mapping[int, int] | None = None,
) -> WidthPolicy | None:
    """For a ladder of several widths that knows what its steps cost; None for any other: it stays as it is."""
    points: Any = ladder.provenance.get("step_seconds")
    if ladder.is_fixed or not points:
        return None
    cost = MeasuredCost(points)
    acceptance = scaled(acceptance, ladder.provenance.get("acceptance_reached", 1.0))
    return WidthPolicy(
        ladder,
        acceptance,
        cost,
        max_num_seqs,
        padded=padded,
        most_requests=most_requests,
        most_rows=ladder.provenance.get("most_rows", np.inf),
    )

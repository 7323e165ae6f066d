"""Serving under load, simulated: recorded acceptance, the engine's own rules, a model of the step's cost.

Every request in flight is an answer whose tokens' ranks in the mask rows' predictions were recorded
(`training.evaluate.answer_ranks`), so each step accepts exactly what the engine would; what a step takes
comes from the cost model. Concurrency is constant: an answer that ends makes room for the next one.
Prefill is left out, in plain decoding too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from bita_vllm.scheduling.online import WidthPolicy
from bita_vllm.training.evaluate import template_choice
from bita_vllm.tree import NO_BLOCK
from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder
from bita_vllm.tree.replay import NO_RANK, Sources, TreeWalker
from bita_vllm.tree.step_cost import StepCost
from bita_vllm.tree.template_set import templates_of

# Ranks after the first, given that the first is wrong: as measured for SmolLM2-135M's adapter with deltas
# (first and second mask alike).
TAIL = (0.25, 0.11, 0.07, 0.04, 0.04, 0.03, 0.025, 0.02, 0.02)


Answer = tuple[list[list[int]], np.ndarray | None]  # ranks, [n][k]; probabilities, if recorded


@dataclass(frozen=True)
class Simulated:
    """One concurrency.

    Attributes:
        tokens_per_second: output tokens over all requests.
        ratio: to plain decoding.
        ratio_of_first: of the requests of the first kind alone, to theirs in plain decoding.
        accepted_length: tokens a request gets a step.
        rows: of a request in a step.
        width: for this concurrency, at the end.
    """

    tokens_per_second: float
    ratio: float
    ratio_of_first: float
    accepted_length: float
    rows: float
    width: int


def simulate(
    ladder: Ladder,
    # each [n, k] int: ranks of one answer
    traces: Sequence[np.ndarray],
    cost: StepCost,
    concurrency: int,
    *,
    context: float = 512.0,
    padded: bool = False,
    num_walks: int = 20_000,
    seed: int = 0,
    policy: WidthPolicy | None = None,
    others: Sequence[np.ndarray] = (),
    probabilities: Sequence[np.ndarray] = (),
    acceptance: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> Simulated:
    """Serve answers drawn at random until about `num_walks` blocks were verified.

    `padded`: blocks always have R rows, as on a GPU. The answers at the start are joined at a random token each.
    With `policy` widths follow what it sees of the load, else the ladder's table; it starts at second 0.
    `others`: a second kind of answers, which every second request draws from.
    `probabilities`, `[n, k, ranks]` for each of `traces`, and the adapter's `acceptance` table: with both, blocks
    choose among the trees of their width's set; else they have its first one.
    `noise`, `[n, 2]`: what consecutive steps took of a quiet machine's seconds, and CPU seconds a second; repeated.
    """
    rng = np.random.default_rng(seed)
    given = list(probabilities) + [None] * (len(traces) - len(probabilities))
    kinds = [
        [(t.tolist(), p) for t, p in zip(kind, known, strict=True) if len(t) > 1]
        for kind, known in ((traces, given), (others, [None] * len(others)))
        if len(kind)
    ]
    sets = ladder.template_sets
    walker = TreeWalker(*templates_of(sets))
    first_of_set = np.cumsum([0, *(len(one.templates) for one in sets)]).tolist()
    choices = [
        template_choice(one, acceptance) if acceptance is not None and one.has_choice else None
        for one in sets
    ]
    num_rows = walker.table.num_rows.tolist()
    table = ladder.lookup(concurrency).tolist()

    names = map(str, count())

    def join(i: int, from_start: bool) -> tuple[str, Answer, int, Sources]:
        answers = kinds[i % len(kinds)]
        answer = answers[rng.integers(len(answers))]
        root = 0 if from_start else int(rng.integers(len(answer[0]) - 1))
        return next(names), answer, root, []

    flight = [join(i, from_start=False) for i in range(concurrency)]
    num_steps = max(10, num_walks // concurrency)
    tokens = [0] * len(kinds)
    rows = 0
    now = 0.0
    for index_of_step in range(num_steps):
        width = (table if policy is None else policy.lookup)[concurrency]
        step_rows = concurrency
        requests = [name for name, *_ in flight]
        resting = set() if policy is None else set(policy.resting)
        lines = [NO_BLOCK] * concurrency
        last_nodes = [0] * concurrency
        for i, (name, answer, root, sources) in enumerate(flight):
            emitted: int = 1
            after: Sources = []
            if width != PLAIN_WIDTH and name not in resting:
                index = ladder.widths.index(width)
                template = first_of_set[index]
                choose = choices[index]
                if choose is not None and answer[1] is not None:
                    template += choose(answer[1], sources)
                step = walker.step(answer[0], root, sources, template)
                lines[i], last_nodes[i] = step.line, step.last_node
                emitted, after = step.emitted, step.sources
                step_rows += width if padded else num_rows[step.line] - 1
            tokens[i % len(kinds)] += emitted
            root += emitted
            goes_on = root < len(answer[0]) - 1
            flight[i] = (name, answer, root, after) if goes_on else join(i, from_start=True)
        rows += step_rows
        seconds = cost.seconds(concurrency, step_rows, context)
        cpu_seconds = None
        if noise is not None:
            factor, busy = noise[index_of_step % len(noise)].tolist()
            seconds *= factor
            cpu_seconds = busy * seconds
        now += seconds
        if policy is not None:
            policy.saw_step(requests, lines, last_nodes, seconds, cpu_seconds)
            policy.review(now)
    plain = concurrency / cost.seconds(concurrency, concurrency, context)
    of_first = len(range(0, concurrency, len(kinds))) / concurrency
    walks = num_steps * concurrency
    return Simulated(
        tokens_per_second=sum(tokens) / now,
        ratio=sum(tokens) / now / plain,
        ratio_of_first=tokens[0] / now / (plain * of_first),
        accepted_length=sum(tokens) / walks,
        rows=rows / walks,
        width=width,
    )


def synthetic_traces(
    top: Sequence[float], num_answers: int, answer_len: int, seed: int
) -> list[np.ndarray]:
    """Answers whose mask j holds the token as its first candidate with probability `top[j]`, independently.

    The other ranks follow `TAIL`; what lies beyond it is in no tree.
    """
    rng = np.random.default_rng(seed)
    traces = []
    for _ in range(num_answers):
        columns = []
        for p in top:
            probability = np.array([p, *((1 - p) * tail for tail in TAIL)])
            ranks = np.searchsorted(np.cumsum(probability), rng.random(answer_len))
            columns.append(np.where(ranks > len(TAIL), 1000, ranks))
        trace = np.stack(columns, axis=1)
        for j in range(len(top)):
            trace[answer_len - 2 - j :, j] = NO_RANK
        traces.append(trace)
    return traces

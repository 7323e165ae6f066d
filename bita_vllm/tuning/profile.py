"""What a decoding step costs on this machine: timed in the real engine, by requests and rows.

One engine serves a ladder whose table is set by hand in its scheduler, so that plain steps and blocks of
every size are timed on the same requests, in turn and in both orders, drift hitting all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from bita_vllm.adapter.config import ModelShape
from bita_vllm.scheduling.timing import Round, StepTime, compare_with_plain, min_rounds
from bita_vllm.tree.ladder import PLAIN_WIDTH, Ladder
from bita_vllm.tree.step_cost import Point
from bita_vllm.tree.template_set import TemplateSet

PROMPT_LEN = 64
KV_BLOCK = 128  # tokens; vLLM's default on a CPU, the largest
# After a change of width the first blocks have no candidates, or are still the old ones.
STEPS_TO_SETTLE = 2
STEPS_A_ROUND = 4
# With async scheduling a step's output may come while the next one runs: only many steps together tell the time.
STEPS_TOGETHER = 8
# Rounds go on until every interval is as narrow as this, relative to its middle; but not longer, and no more of them.
PRECISION = 0.02
MOST_SECONDS = 10.0
MOST_ROUNDS = 24
# A machine is warm when a round takes no less than this share of the one before it.
STEADY = 0.97
MOST_WARM_UPS = 12


def profile_ladder(sets: Sequence[TemplateSet], max_requests: int) -> Ladder:
    """A ladder to time blocks of every set with, and plain steps, at up to `max_requests`; it takes that many more.

    CUDA graphs of a width are captured up to the largest batch that the table has it for, so every width is
    named after the batches that are timed.
    """
    widths = sorted(one.first.width for one in sets)
    behind = [(max_requests + i, max_requests + i, width) for i, width in enumerate(widths, 1)]
    return Ladder(sets, [(1, max_requests, PLAIN_WIDTH), *behind])


def profile_steps(
    llm: Any, requests: Sequence[int], widths: Sequence[int], num_steps: int
) -> list[Point]:
    """What plain steps and steps of every width take.

    Args:
        llm: an engine in this process, with a `profile_ladder` that has all `widths`.
        requests: numbers of requests in the batch.
        num_steps: steps timed at each point at least.
    """
    points: list[Point] = []
    scheduler = scheduler_of(llm)
    together = STEPS_TOGETHER if scheduler.scheduler_config.async_scheduling else 1
    per_round = max(STEPS_A_ROUND, together)
    fewest_rounds = max(min_rounds(), -(-num_steps // per_round))
    order = [PLAIN_WIDTH, *widths]
    for n in requests:
        before = float("inf")
        for _ in range(MOST_WARM_UPS):
            seconds = _seconds(_time_round(llm, n, order, per_round, together))
            if seconds > STEADY * before:
                break
            before = seconds
        rounds: list[Round] = []
        begin = time.monotonic()
        with tqdm(desc=f"timing steps, {n} requests", unit="round") as bar:
            while len(rounds) < fewest_rounds or not (
                is_precise(rounds)
                or len(rounds) >= MOST_ROUNDS
                or time.monotonic() - begin > MOST_SECONDS
            ):
                # Every other round backwards, so that drift hits all alike.
                rounds.append(
                    _time_round(llm, n, order[:: 1 - 2 * (len(rounds) % 2)], per_round, together)
                )
                bar.update()
        plain, found = compare_with_plain(rounds)
        points.append(Point(n, 1.0, plain, 0.0))
        points += [Point(n, c.rows / n, plain * c.ratio, c.spread) for c in found.values()]
    return points


def is_precise(rounds: Sequence[Round]) -> bool:
    """Whether more rounds are not worth their time."""
    _, found = compare_with_plain(rounds)
    return all(c.spread <= PRECISION for c in found.values())


def _seconds(one: Round) -> float:
    return statistics.mean(time.seconds for times in one.values() for time in times)


def _time_round(
    llm: Any, num_requests: int, widths: Sequence[int], num_steps: int, together: int
) -> Round:
    """Steps of all widths on the same requests."""
    scheduler = scheduler_of(llm)
    found = {}
    with _decoding(llm, num_requests) as step:
        for width in widths:
            set_width(scheduler, width)
            _timed(step, STEPS_TO_SETTLE)
            found[width] = [_timed(step, together) for _ in range(num_steps // together)]
    return found


def graph_sizes(requests: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Rows of a step at every point: what CUDA graphs are captured for, and nothing else."""
    return sorted({n * (width + 1) for n in requests for width in (PLAIN_WIDTH, *widths)})


def max_model_len(num_widths: int, max_depth: int, num_rows: int) -> int:
    """Tokens that a request of `profile_steps` may come to."""
    steps = (num_widths + 1) * (STEPS_TO_SETTLE + max(STEPS_A_ROUND, STEPS_TOGETHER))
    return PROMPT_LEN + steps * (max_depth + 1) + num_rows + 1


def kv_cache_bytes(
    model: ModelShape, num_requests: int, num_tokens: int, bytes_a_value: int
) -> int:
    """Memory for the KV of so many requests of that length, instead of all that there is."""
    tokens = (num_requests + 1) * -(-num_tokens // KV_BLOCK) * KV_BLOCK
    values = 2 * model.num_layers * model.num_kv_heads * model.head_size
    return tokens * values * bytes_a_value


def scheduler_of(llm: Any) -> Any:
    """Of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def set_width(scheduler: Any, width: int) -> None:
    """Every later block has it, whatever the batch size."""
    scheduler.dynamic_sd_lookup = [width] * len(scheduler.dynamic_sd_lookup)


def _timed(step: Callable[[], int], number: int) -> StepTime:
    """Mean over so many steps."""
    start, cpu_start = time.perf_counter(), time.process_time()
    rows = sum(step() for _ in range(number))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return StepTime(rows / number, seconds / number, cpu_seconds / number)


@contextmanager
def _decoding(llm: Any, num_requests: int) -> Iterator[Callable[[], int]]:
    """Yield a function that runs a step of so many requests after their prefill and returns its rows.

    The requests are aborted at the end.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler, rows = scheduler_of(llm), 0

    def see(output: Any) -> None:
        nonlocal rows
        rows = output.total_num_scheduled_tokens

    def step() -> int:
        engine.step()
        return rows

    config = engine.model_config
    # Room for the longest answers that trees can give.
    longest = config.max_model_len - PROMPT_LEN
    params = SamplingParams(temperature=0.0, max_tokens=longest, ignore_eos=True, detokenize=False)
    names = [f"profile-{num_requests}-{i}" for i in range(num_requests)]
    with every_schedule(scheduler, see):
        try:
            set_width(scheduler, PLAIN_WIDTH)
            for i, name in enumerate(names):
                prompt = [
                    (7 * i + 3 * place) % config.get_vocab_size() for place in range(PROMPT_LEN)
                ]
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            decoding: set[str] = set()
            while len(decoding) < num_requests:
                decoding |= {output.request_id for output in engine.step()}
            yield step
        finally:
            engine.abort_request(names)
            while engine.has_unfinished_requests():
                engine.step()


@contextmanager
def every_schedule(scheduler: Any, see: Callable[[Any], None]) -> Iterator[None]:
    """Hand vLLM's SchedulerOutput of every step to `see`."""
    schedule = scheduler.schedule

    def seen(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        see(output)
        return output

    scheduler.schedule = seen
    try:
        yield
    finally:
        scheduler.schedule = schedule

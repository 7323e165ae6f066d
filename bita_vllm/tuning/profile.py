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

from bita_vllm.adapter_config import ModelShape
from bita_vllm.ladder import PLAIN_WIDTH, Ladder
from bita_vllm.template_set import sets_of_one
from bita_vllm.tree import Template

PROMPT_LEN = 64
KV_BLOCK = 128  # tokens; vLLM's default on a CPU, the largest
WARM_UP_STEPS = (
    2  # after a change of width the first blocks have no candidates, or are still the old ones
)
STEPS_A_ROUND = 4
# With async scheduling a step's output may come while the next one runs: only many steps together tell the time.
STEPS_TOGETHER = 8


def profile_ladder(templates: Sequence[Template], max_requests: int) -> Ladder:
    """A ladder to time all templates with, and plain steps, at up to `max_requests`; it takes that many requests more.

    CUDA graphs of a width are captured up to the largest batch that the table has it for, so every width is
    named behind the batches that are timed.
    """
    widths = sorted(template.num_rows - 1 for template in templates)
    behind = [(max_requests + i, max_requests + i, width) for i, width in enumerate(widths, 1)]
    return Ladder(sets_of_one(templates), [(1, max_requests, PLAIN_WIDTH), *behind])


def profile_steps(
    llm: Any, requests: Sequence[int], widths: Sequence[int], num_steps: int
) -> list[tuple[int, float, float]]:
    """(requests, mean rows a request, median seconds a step) for plain decoding and every width.

    Args:
        llm: an engine in this process, with a `profile_ladder` that has all `widths`.
        requests: numbers of requests in the batch.
        num_steps: steps timed at each point at least, in at least two rounds.
    """
    points = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    together = STEPS_TOGETHER if scheduler.scheduler_config.async_scheduling else 1
    per_round = max(STEPS_A_ROUND, together)
    num_rounds = max(2, -(-num_steps // per_round))
    orders = [PLAIN_WIDTH, *widths], [*widths[::-1], PLAIN_WIDTH]
    with tqdm(total=num_rounds * len(requests), desc="timing steps", unit="round") as bar:
        for n in requests:
            found: dict[int, list[tuple[float, float]]] = {width: [] for width in orders[0]}
            for i in range(num_rounds):
                with _decoding(llm, n) as step:
                    for width in orders[i % 2]:
                        _set_width(scheduler, width)
                        _timed(step, WARM_UP_STEPS)
                        found[width] += [
                            _timed(step, together) for _ in range(per_round // together)
                        ]
                bar.update()
            for measured in found.values():
                rows = statistics.mean(rows for rows, _ in measured) / n
                points.append((n, rows, statistics.median(seconds for _, seconds in measured)))
    return points


def graph_sizes(requests: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Rows of a step at every point: what CUDA graphs are captured for, and nothing else."""
    return sorted({n * (width + 1) for n in requests for width in (PLAIN_WIDTH, *widths)})


def max_model_len(num_widths: int, max_depth: int, num_rows: int) -> int:
    """Tokens that a request of `profile_steps` may come to."""
    steps = (num_widths + 1) * (WARM_UP_STEPS + max(STEPS_A_ROUND, STEPS_TOGETHER))
    return PROMPT_LEN + steps * (max_depth + 1) + num_rows + 1


def kv_cache_bytes(
    model: ModelShape, num_requests: int, num_tokens: int, bytes_a_value: int
) -> int:
    """Memory for the KV of so many requests of that length, instead of all that there is."""
    tokens = (num_requests + 1) * -(-num_tokens // KV_BLOCK) * KV_BLOCK
    values = 2 * model.num_layers * model.num_kv_heads * model.head_size
    return tokens * values * bytes_a_value


def _set_width(scheduler: Any, width: int) -> None:
    """Every later block has it, whatever the batch size."""
    scheduler.dynamic_sd_lookup = [width] * len(scheduler.dynamic_sd_lookup)


def _timed(step: Callable[[], int], number: int) -> tuple[float, float]:
    """(rows of a step, seconds a step) over so many steps."""
    start = time.perf_counter()
    rows = sum(step() for _ in range(number))
    return rows / number, (time.perf_counter() - start) / number


@contextmanager
def _decoding(llm: Any, num_requests: int) -> Iterator[Callable[[], int]]:
    """A step with so many requests behind their prefill, which returns its rows; they are aborted at the end."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    schedule, rows = scheduler.schedule, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        output = schedule(*args, **kwargs)
        rows = output.total_num_scheduled_tokens
        return output

    def step() -> int:
        engine.step()
        return rows

    config = engine.model_config
    # Room for the longest answers that trees can give.
    longest = config.max_model_len - PROMPT_LEN
    params = SamplingParams(temperature=0.0, max_tokens=longest, ignore_eos=True, detokenize=False)
    names = [f"profile-{num_requests}-{i}" for i in range(num_requests)]
    scheduler.schedule = counting
    try:
        _set_width(scheduler, PLAIN_WIDTH)
        for i, name in enumerate(names):
            prompt = [(7 * i + 3 * place) % config.get_vocab_size() for place in range(PROMPT_LEN)]
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        decoding: set[str] = set()
        while len(decoding) < num_requests:
            decoding |= {output.request_id for output in engine.step()}
        yield step
    finally:
        engine.abort_request(names)
        scheduler.schedule = schedule
        while engine.has_unfinished_requests():
            engine.step()

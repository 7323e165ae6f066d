"""What a decoding step costs on this machine: timed in the real engine, by requests and rows.

One engine serves a ladder whose table is set by hand in its scheduler, so that plain steps and blocks of
every size are timed on the same requests, in turn and in both orders, drift hitting all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Sequence
from typing import Any

from tqdm import tqdm

from bita_vllm.ladder import PLAIN_WIDTH

PROMPT_LEN = 64
WARM_UP_STEPS = 2  # after a change of width the first blocks have no candidates


def profile_steps(
    llm: Any, requests: Sequence[int], widths: Sequence[int], num_steps: int
) -> list[tuple[int, float, float]]:
    """(requests, mean rows a request, median seconds a step) for plain decoding and every width.

    Args:
        llm: an engine in this process, with a ladder that has all `widths`.
        requests: numbers of requests in the batch.
        num_steps: steps timed at each point, half of them in each of two rounds.
    """
    points = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    widths = [PLAIN_WIDTH, *widths]
    per_round = -(-num_steps // 2)
    with tqdm(total=2 * len(requests) * len(widths), desc="timing steps", unit="point") as bar:
        for n in requests:
            steps = _decode_steps(llm, n, 2 * len(widths) * (per_round + WARM_UP_STEPS))
            found: dict[int, list[tuple[int, float]]] = {width: [] for width in widths}
            for order in (widths, widths[::-1]):
                for width in order:
                    _set_width(scheduler, width)
                    timed = [next(steps) for _ in range(WARM_UP_STEPS + per_round)]
                    found[width] += timed[WARM_UP_STEPS:]
                    bar.update()
            steps.close()
            for measured in found.values():
                rows = statistics.mean(rows for rows, _ in measured) / n
                points.append((n, rows, statistics.median(seconds for _, seconds in measured)))
    return points


def _set_width(scheduler: Any, width: int) -> None:
    """Every later block has it, whatever the batch size."""
    scheduler.dynamic_sd_lookup = [width] * len(scheduler.dynamic_sd_lookup)


def _decode_steps(llm: Any, num_requests: int, num_steps: int) -> Generator[tuple[int, float]]:
    """(rows, seconds) of one step after the other, `num_requests` decoding in each; aborted at the end."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    schedule, rows = scheduler.schedule, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        output = schedule(*args, **kwargs)
        rows = output.total_num_scheduled_tokens
        return output

    config = llm.llm_engine.model_config
    # Room for the longest answers that trees can give.
    longest = config.max_model_len - PROMPT_LEN
    params = SamplingParams(temperature=0.0, max_tokens=longest, ignore_eos=True)
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
        for _ in range(num_steps):
            start = time.perf_counter()
            engine.step()
            yield rows, time.perf_counter() - start
    finally:
        engine.abort_request(names)
        scheduler.schedule = schedule
        while engine.has_unfinished_requests():
            engine.step()


def max_model_len(num_widths: int, num_steps: int, max_depth: int, num_rows: int) -> int:
    """Tokens that a request of `profile_steps` may come to."""
    steps = 2 * (num_widths + 1) * (-(-num_steps // 2) + WARM_UP_STEPS)
    return PROMPT_LEN + steps * (max_depth + 1) + num_rows + 1

"""What copies cost a step on the host: the call of `CopyIndex`, by requests and by tokens of their texts.

Texts are of a small vocabulary with Zipf's law, in which matches are many and chains long. Every timed step follows
three new tokens of each request. `first_ms`: the call that indexes the texts, an average for one request.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from cpu_throughput import RESULTS, rounded, write_csv
from provenance import provenance

from bita_vllm.step.copies import CopyIndex

NEW_TOKENS = 3
VOCAB_SIZE = 8192


def measure(num_requests: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of the first call, for each request, and microseconds of later calls: median and 90th percentile."""
    rng = np.random.default_rng(0)
    size = context + NEW_TOKENS * (steps + 1)
    ranks = np.minimum(rng.zipf(1.2, (num_requests, size)), VOCAB_SIZE)
    texts = torch.from_numpy(ranks.astype(np.int32))
    names = [f"request {i}" for i in range(num_requests)]
    index = CopyIndex(num_requests, size)
    seconds = []
    for step in range(steps + 1):
        num_tokens = np.full(num_requests, context + NEW_TOKENS * step)
        start = time.perf_counter()
        index(names, texts, num_tokens)
        seconds.append(time.perf_counter() - start)
    later = 1e6 * np.array(seconds[1:])
    return {
        "first_ms": 1e3 * seconds[0] / num_requests,
        "step_us": float(np.median(later)),
        "step_us_p90": float(np.quantile(later, 0.9)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[8192, 131072])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "copies_cpu.csv", help="CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts, rows = provenance(), []
    for context in args.context:
        for requests in args.requests:
            found = measure(requests, context, args.steps)
            rows.append(rounded({"context": context, "requests": requests, **found, **facts}))
            print({k: rows[-1][k] for k in ("context", "requests", *found)})
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()

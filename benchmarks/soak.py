"""Thousands of mixed requests on a real server with BiTA, next to a plain one: is anything lost, or left behind?

Both servers are `vllm serve` as `make serve` starts it (compiled, bfloat16, a ladder), with a KV cache so small
that requests are preempted. Each gets the same requests (soak_requests.py) in legs; after each leg it is idle, and
is looked at: resident memory of its processes, KV cache in use, entries of every container of ours. What is found
after a fifth of the requests must be found at the end. Greedy answers are compared: where they differ, plain
vLLM's top two logits must lie within bf16 rounding of each other, as in tests/e2e/test_bf16.py.

The exit code is 1 if anything is not as it should be.
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_throughput import ADAPTER, RESULTS, rounded, write_csv
from provenance import provenance
from soak_client import Answer
from soak_compare import Difference, compared, differences
from soak_requests import Request, count_by_kind, requests
from soak_server import START_TIMEOUT_S, SoakServer, State
from testbed.server_process import ServerError

LEGS = 10
WARM_LEGS = 2  # a fifth: buffers have grown to their size
RSS_GROWTH = 0.01  # beyond plain vLLM's own
PLAIN, BITA = "plain", "bita"


@dataclass
class Result:
    """What both servers showed."""

    states: dict[str, list[State]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    error_lines: dict[str, list[str]] = field(default_factory=dict)
    different: list[Difference] = field(default_factory=list)

    def growth(self, arm: str, process: str) -> float:
        """Growth of a process's resident memory since the warm-up, as a share."""
        states = self.states[arm]
        return states[-1].rss[process] / states[WARM_LEGS - 1].rss[process] - 1


def soak(
    model: str | Path,
    bita: dict[str, Any],
    flags: Sequence[str],
    made: Sequence[Request],
    clients: int,
    logs: Path,
) -> Result:
    """Send the requests to a plain server, then to one with `bita` as its speculative config. Raises ServerError."""
    from tqdm import tqdm

    config = ["--speculative-config", json.dumps({"method": BITA, **bita})]
    flags = [*flags, "--logprobs-mode", "raw_logits", "--enable-auto-tool-choice"]
    flags += ["--tool-call-parser", "hermes"]
    result, servers = Result(), []
    try:
        for arm, own in ((PLAIN, []), (BITA, config)):
            servers.append(SoakServer(arm, model, [*flags, *own], logs / f"{arm}.log"))
        for server in servers:
            server.wait_until_healthy(START_TIMEOUT_S)
        for server in servers:
            with tqdm(total=len(made), desc=server.name, unit="request") as bar:
                states, answers = server.legs(made, LEGS, clients, bar.update)
            result.states[server.name], result.answers[server.name] = states, answers
            result.error_lines[server.name] = server.error_lines()
        both = (result.answers[arm] for arm in (PLAIN, BITA))
        result.different = differences(servers[0].url, made, *both)
    finally:
        for server in servers:
            server.stop()
    return result


def faults(result: Result, made: Sequence[Request], dtype: str, rss_growth: float) -> list[str]:
    """What is not as it should be, a sentence each."""
    found = []
    for arm in (PLAIN, BITA):
        for request, answer in zip(made, result.answers[arm], strict=True):
            if answer.fault:
                found.append(f"{arm}: a request ({request.kind}) failed: {answer.fault}.")
        if not sum(state.preempted for state in result.states[arm]):
            found.append(f"{arm}: no request was preempted; the KV cache is too large for a soak.")
    states = result.states[BITA]
    if not sum(state.drafted for state in states):
        found.append("bita: no token was drafted.")
    warm, end = states[WARM_LEGS - 1], states[-1]
    for name in sorted(warm.containers.keys() | end.containers.keys()):
        sizes = [state.containers.get(name, 0) for state in (warm, end)]
        if sizes[0] != sizes[1]:
            found.append(f"bita: {name} had {sizes[0]} entries, and {sizes[1]} at the end.")
    if end.kv_usage:
        found.append(f"bita: {end.kv_usage:.2%} of the KV cache are in use at the end.")
    for process in end.rss:
        growth, plain = (
            result.growth(arm, process) if process in result.states[arm][-1].rss else 0.0
            for arm in (BITA, PLAIN)
        )
        if growth > rss_growth + max(plain, 0.0):
            found.append(f"bita: memory of {process} grew by {growth:.2%}, plain's by {plain:.2%}.")
    found += [f"bita: in the log: {line}" for line in result.error_lines[BITA]]
    for d in result.different:
        if not d.is_rounding(dtype):
            found.append(
                f"bita: request {d.request} differs from token {d.position} on, where plain vLLM's "
                f"top two logits are {d.gap:.4f} apart, the first {d.top:.2f}."
            )
    return found


def rows_of(result: Result, made: Sequence[Request]) -> list[dict[str, Any]]:
    """A row for each leg of each server."""
    number, different = len(compared(made)), len(result.different)
    rows = []
    for arm in (PLAIN, BITA):
        for state in result.states[arm]:
            rows.append(
                {
                    "arm": arm,
                    "requests": state.requests,
                    "seconds": state.seconds,
                    "output_tokens": state.tokens,
                    "drafted": state.drafted,
                    "accepted": state.accepted,
                    "preempted": state.preempted,
                    **{
                        f"{name.replace(' ', '_')}_mb": state.rss.get(name, 0) / 1e6
                        for name in ("front end", "engine")
                    },
                    "kv_usage": state.kv_usage,
                    "container_entries": sum(state.containers.values()),
                    "failed": sum(bool(a.fault) for a in result.answers[arm][: state.requests]),
                    "error_lines": len(result.error_lines[arm]),
                    "greedy_identical": f"{number - different} of {number}" if arm == BITA else "",
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, aligned."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=int, default=3000, metavar="N", help="default: %(default)s")
    add("--clients", type=int, default=16, metavar="N", help="requests in flight (default: 16)")
    add("--max-tokens", type=int, default=32, help="an answer, at most (default: %(default)s)")
    add("--long-prompt", type=int, default=1000, help="its tokens (default: %(default)s)")
    add("--kv-cache-memory-bytes", type=int, default=52 << 20,
        help="so small that requests are preempted (default: 52 MiB; one longest request takes 48)")  # fmt: skip
    add("--ladder", metavar="FILE", help="default: the adapter's own rows")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    add("--seed", type=int, default=0, help="of the requests (default: 0)")
    add("--engine-args", default="", metavar="FLAGS", help="more flags of `vllm serve`, for both")
    add("--out", type=Path, default=RESULTS / "soak.csv", help="default: results/soak.csv")
    args = parser.parse_args()
    if args.requests < 2 * LEGS or args.clients < 1 or args.max_tokens < 4:
        parser.error(f"--requests starts at {2 * LEGS}, --clients at 1, --max-tokens at 4")
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: terminated"))
    from transformers import AutoTokenizer

    from bita_vllm.embedded import embedded_model_dir

    model, name = embedded_model_dir(), "smollm2"
    flags = ["--served-model-name", name, "--dtype", args.dtype, "--max-model-len", "2048"]
    flags += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    flags += shlex.split(args.engine_args)
    bita = {"model": str(ADAPTER), **({"ladder": args.ladder} if args.ladder else {})}
    made = requests(
        args.requests,
        AutoTokenizer.from_pretrained(model),
        name,
        args.long_prompt,
        args.max_tokens,
        args.seed,
    )
    print(", ".join(f"{kind}: {count}" for kind, count in count_by_kind(made).items()))
    with tempfile.TemporaryDirectory(prefix="soak-") as logs:
        try:
            result = soak(model, bita, flags, made, args.clients, Path(logs))
        except ServerError as error:
            sys.exit(f"soak: {error}")
    rows = rows_of(result, made)
    facts = {**provenance(), "model": name, "dtype": args.dtype, "seed": args.seed}
    facts |= {"clients": args.clients, "kv_cache_bytes": args.kv_cache_memory_bytes}
    write_csv(args.out, [rounded({**facts, **row}) for row in rows])
    print(table(rows))
    for arm in (PLAIN, BITA):
        grown = (f"{p} {result.growth(arm, p):+.2%}" for p in result.states[arm][-1].rss)
        print(f"{arm}, memory since the warm-up: {', '.join(grown)}")
    found = faults(result, made, args.dtype, RSS_GROWTH)
    print("\n".join(found) if found else "nothing lost, nothing left behind")
    print(f"written: {args.out}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

"""What each kernel and a whole step take on a GPU, predicted: weights, waves, bytes in flight, launches.

No GPU is needed, and none was used: a device is its data sheet and a few shares and latencies (named below, with their
source), a model is its dimensions, and an implementation says how its kernels are cut. So a run on a GPU confirms
or refutes named numbers. `before` is the code at 4bb899c, `mended` today's: tiles, splits and programs come
from the kernels' own rules, programs and buffers of an SM from kernels_aot.csv. Decoding only, greedy:
prefill and what the host does not hide are left out. Below 32 requests expect +-15%, above +-30%.

Accepted lengths are the shipped adapters', of SmolLM2-135M; there is no adapter for a larger model yet. The arm
`default` has the rows that serving takes without a ladder (`bita_vllm/scheduling/default_rows.py`).
"""

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cpu_throughput import RESULTS, ROOT, rounded, write_csv
from provenance import provenance
from step_model import DEVICES, IMPLEMENTATIONS, MODELS, PerformanceModel

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.scheduling.default_rows import Machine, default_ladder
from bita_vllm.tree.ladder import Ladder

ROWS = (1, 3, 4, 5, 8, 16, 24, 52)
REQUESTS = (1, 8, 32, 128)
CONTEXTS = (1000, 8000)
DEFAULT = "default"

# --- Adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A shipped adapter: its accepted length by rows of a block.

    8, 16, 24 and 52 rows: README.md (31 MT-Bench answers). The others: with deltas replayed on MT-Bench
    (docs/tuning.md), without from the adapter's statistics, which are within 1% where both are known.
    """

    folder: str
    has_deltas: bool
    accepted: Mapping[int, float]


ADAPTERS = {
    "deltas": Adapter(
        "smollm2-135m-instruct",
        True,
        {1: 1.0, 3: 1.33, 4: 1.63, 5: 1.78, 6: 1.88, 8: 2.00, 10: 2.09, 12: 2.20, 16: 2.30, 20: 2.38,
         24: 2.43, 32: 2.52, 48: 2.63, 52: 2.65, 64: 2.71},
    ),
    "no deltas": Adapter(
        "smollm2-135m-instruct-no-deltas",
        False,
        {1: 1.0, 3: 1.30, 4: 1.42, 5: 1.49, 6: 1.55, 8: 1.64, 10: 1.73, 12: 1.80, 16: 1.88, 20: 1.94,
         24: 1.98, 32: 2.05, 48: 2.13, 52: 2.15, 64: 2.20},
    ),
}  # fmt: skip


@cache
def ladder_of(device: str, model: str, adapter: str) -> Ladder:
    """Rows by load without a ladder; on a device that is not one of the table, as where its speed is not known."""
    speed = DEVICES[device].speed if device in DEVICES else None
    shipped = ADAPTERS[adapter]
    config = AdapterConfig.load(ROOT / "adapters" / shipped.folder)
    machine = Machine(on_gpu=True, speed=speed, has_deltas=shipped.has_deltas)
    ladder = default_ladder(config, machine, MODELS[model])
    assert ladder is not None  # every block fits
    return ladder


def points(names: Mapping[str, Any], requests: int, context: int) -> list[dict[str, Any]]:
    """CSV rows of one load: each number of rows, then what the default takes. `names`: keys of the tables above."""
    device, model = DEVICES[names["device"]], MODELS[names["model"]]
    adapter, code = ADAPTERS[names["adapter"]], IMPLEMENTATIONS[names["implementation"]]
    plain = PerformanceModel(device, model, code).plain(requests, context).total
    ladder = ladder_of(names["device"], names["model"], names["adapter"])
    chosen = int(ladder.lookup(requests)[requests]) + 1
    found = []
    for arm, rows in [*((f"{rows} rows", rows) for rows in ROWS), (DEFAULT, chosen)]:
        widest = ladder.widest.num_rows if arm == DEFAULT else rows
        predict = PerformanceModel(device, model, code, adapter.has_deltas, widest)
        step = predict.step(requests, rows, context)
        length = adapter.accepted[rows]
        found.append(
            {
                "predicted_for": device.name,
                **{name: value for name, value in names.items() if name != "device"},
                "context": context,
                "requests": requests,
                "arm": arm,
                "rows": rows,
                "accepted_length": length,
                "plain_ms": 1e3 * plain,
                "step_ms": 1e3 * step.total,
                "ratio": length * plain / step.total,
                "tree_attention_us": 1e6 * predict.tree_attention(requests, rows, context),
                "flash_attention_us": 1e6 * predict.flash_attention(requests, context),
                **{f"{name}_ms": 1e3 * seconds for name, seconds in asdict(step).items()},
                **{f"code_{name}": str(value) for name, value in vars(code).items()},
            }
        )
    return found


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Ratios to plain vLLM, a table for each device, model, adapter, implementation and context."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=120)
    heads = ("predicted_for", "model", "adapter", "implementation", "context")
    groups: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        of_group = groups.setdefault(tuple(row[head] for head in heads), {})
        of_group.setdefault(row["requests"], []).append(row)
    for names, by_requests in groups.items():
        *rest, context = names
        table = Table(box=None, pad_edge=False, title=", ".join(rest) + f", context {context}")
        table.title_justify = "left"
        arms = [row["arm"] for row in next(iter(by_requests.values()))]
        for column in ("requests", "plain ms", *arms):
            table.add_column(column, justify="right")
        for requests, cells in by_requests.items():
            ratios = [
                f"{row['ratio']:.2f}" + (f" ({row['rows']})" if row["arm"] == DEFAULT else "")
                for row in cells
            ]
            table.add_row(str(requests), f"{cells[0]['plain_ms']:.2f}", *ratios)
        console.print(table, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {
        "device": DEVICES, "model": MODELS, "adapter": ADAPTERS, "implementation": IMPLEMENTATIONS
    }  # fmt: skip
    for name, table in tables.items():
        default = list(table)[:1] if name in ("device", "model") else list(table)
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=list(table),
            default=default,
            help="default: %(default)s",
        )
    for name, numbers in (("requests", REQUESTS), ("context", CONTEXTS)):
        parser.add_argument(
            f"--{name}", nargs="+", type=int, default=list(numbers), help="default: %(default)s"
        )
    parser.add_argument("--out", type=Path, default=RESULTS / "performance_model.csv", help="CSV")
    args = parser.parse_args()
    facts = provenance()
    rows = [
        rounded({**point, **facts})
        for names in itertools.product(*(getattr(args, name) for name in tables))
        for context in args.context
        for requests in args.requests
        for point in points(dict(zip(tables, names, strict=True)), requests, context)
    ]
    write_csv(args.out, rows)
    print_tables(rows)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()

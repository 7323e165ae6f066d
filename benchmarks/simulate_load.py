"""Rows by load on an H100, simulated: output tokens/s compared with plain decoding at 1 to 512 concurrent requests.

No GPU is needed, and none was used: acceptance is recorded or made up (`--help`), what a step takes is a
roofline's (`bita_vllm.tree.step_cost.H100_8B` states every number). So the ratios are what the method allows on
that machine, not what a server was measured at. EAGLE-3's figures next to them are published measurements
(SGLang, H100, 8B model): they pay for all that the roofline leaves out.
"""

import argparse
import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cpu_throughput import RESULTS, ROOT, rounded, table
from provenance import provenance
from testbed.recorded_ranks import recorded_predictions, recorded_ranks

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.training.evaluate import Predictions, acceptance_statistics
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.ladder_search import choose_ladder
from bita_vllm.tree.search import acceptance_table
from bita_vllm.tree.step_cost import H100_8B
from bita_vllm.tree.template_set import TemplateSet, saved_sets
from bita_vllm.tuning.simulator import simulate, synthetic_traces

CONCURRENCIES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
SMOLLM2 = "SmolLM2-135M"  # the shipped adapter's acceptance
ADAPTER = ROOT / "adapters" / "smollm2-135m-instruct"
EAGLE_3 = {1: 2.36, 8: 1.62, 16: 1.48, 64: 1.38}
MASKS_8B = (0.6, 0.4, 0.28)
FIXED = {
    "fixed 52 rows": Template.from_widths([5, 4, 3], 3),
    "chain": Template.from_widths([1, 1, 1], 3),
}


def acceptance(name: str, seed: int) -> tuple[list[np.ndarray], Predictions]:
    """Answers that the ladder is chosen by, answers that it serves."""
    if name == SMOLLM2:
        return recorded_ranks("own_prompts"), recorded_predictions("mt_bench")
    traces = synthetic_traces(MASKS_8B, 160, 256, seed)
    return traces[::2], Predictions(traces[1::2], [])


def arms(name: str, statistics: np.ndarray, context: int) -> tuple[dict[str, Ladder], str]:
    """Ladders by arm. Made-up answers have no confidence to choose trees by."""

    def chosen(sets: Mapping[int, TemplateSet]) -> Ladder:
        most = CONCURRENCIES[-1]
        return choose_ladder(statistics, H100_8B, most, context=context, padded=True, sets=sets)[0]

    auto = {"auto": chosen({})}
    if name == SMOLLM2:
        sets = saved_sets(AdapterConfig.load(ADAPTER).acceptance)
        auto = {"auto": chosen(sets), "auto, one tree a width": auto["auto"]}
    fixed = {name: Ladder.fixed(template) for name, template in FIXED.items()}
    return {**auto, **fixed}, auto["auto"].describe()


def plot(path: Path, series: dict[tuple[str, str], list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(traces for traces, _ in series))
    figure, panels = plt.subplots(1, len(names), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        axes.axhline(1.0, color="grey", linestyle="--", label="plain vLLM")
        for (traces, arm), ratios in series.items():
            if traces == name:
                axes.plot(CONCURRENCIES, ratios, marker="o", label=f"BiTA {arm} (simulated)")
        axes.plot(
            list(EAGLE_3), list(EAGLE_3.values()), "k^", label="EAGLE-3 (published, measured)"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(CONCURRENCIES, [str(n) for n in CONCURRENCIES])
        axes.set(xlabel="concurrent requests", title=f"8B in bf16 on an H100, acceptance: {name}")
        axes.title.set_size(9)
    panels[0].set_ylabel("output tokens/s, to plain decoding")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--context",
        type=int,
        default=1024,
        help="tokens of context a request (default: %(default)s)",
    )
    add("--walks", type=int, default=20_000, help="blocks walked a point (default: %(default)s)")
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        default=RESULTS / "simulate_load.csv",
        help="CSV; the plot lies next to it",
    )
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    series: dict[tuple[str, str], list[float]] = {}
    for name in (SMOLLM2, "8B-like"):
        seen, served = acceptance(name, args.seed)
        statistics = acceptance_table(acceptance_statistics(seen), len(MASKS_8B))
        ladders, text = arms(name, statistics, args.context)
        print(f"{name}: {text}")
        for arm, ladder in ladders.items():
            for n in CONCURRENCIES:
                result = simulate(
                    ladder, served.ranks, H100_8B, n, context=args.context, padded=True,
                    num_walks=args.walks, seed=args.seed, probabilities=served.probabilities,
                    acceptance=statistics,
                )  # fmt: skip
                series.setdefault((name, arm), []).append(result.ratio)
                rows.append(
                    rounded(
                        {
                            "cost": "H100 roofline, 8B bf16",
                            "acceptance": name,
                            "arm": arm,
                            "concurrency": n,
                            "context": args.context,
                            **asdict(result),
                            "eagle_3_published": EAGLE_3.get(n, ""),
                            "walks": args.walks,
                            "seed": args.seed,
                            **{f"cost_{key}": value for key, value in asdict(H100_8B).items()},
                            **provenance(),
                        }
                    )
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(args.out.with_suffix(".png"), series)
    header = ["concurrent", *(f"{name} {arm}" for name, arm in series), "EAGLE-3 (measured)"]
    lines = [
        [str(n), *(f"{ratios[i]:.2f}" for ratios in series.values()), str(EAGLE_3.get(n, ""))]
        for i, n in enumerate(CONCURRENCIES)
    ]
    print(f"\n{table(header, lines)}\n\nwritten: {args.out}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()

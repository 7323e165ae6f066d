"""The recipe's ablation: one choice changed at a time, the same number of mask rows trained each time.

Every run trains an adapter with `bita train`, and is measured as `bita eval` does, on answers that no
run was trained on. One CSV row a run, appended as it ends; runs that the file holds already are left
out, so an interrupted ablation goes on.

    python benchmarks/training_ablation.py --data own.jsonl --eval-data mt_bench.jsonl [--other-data human.jsonl]
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tqdm import tqdm

from bita_vllm.cli import make_parser
from bita_vllm.training.base_model import load_base
from bita_vllm.training.distributed import Processes
from bita_vllm.training.evaluate import (
    acceptance_statistics,
    accepted_lengths,
    answer_ranks,
    mask_accuracy,
)
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.samples import read_samples
from bita_vllm.training.train_command import make_trainer
from bita_vllm.tree import Template
from bita_vllm.tree.search import best_template

# Rows of a step: sequences x groups x masks, 192 in all of them.
BASE = {"--batch-size": "1", "--groups": "64", "--warmup": "4"}
LORA = {"--lora-rank": "64"}
RUNS: dict[str, dict[str, str]] = {
    "base: lr 3e-2, P 16, k 3, KL, 64 groups": {},
    "rank 64, lora lr 3e-3": {**LORA, "--lora-lr": "0.003"},
    "hard labels": {"--distill": "0"},
    "P 0": {"--prompt-tokens": "0"},
    "lr 1e-1": {"--lr": "0.1"},
    "P 64": {"--prompt-tokens": "64"},
    "k 4, 48 groups": {"--mask-tokens": "4", "--groups": "48"},
    "rank 64, lora lr 6e-3": {**LORA, "--lora-lr": "0.006"},
    "rank 64, lora lr 1.2e-2": {**LORA, "--lora-lr": "0.012"},
    "k 2, 96 groups": {"--mask-tokens": "2", "--groups": "96"},
    "rank 16, lora lr 3e-3": {"--lora-rank": "16", "--lora-lr": "0.003"},
    "rank 16, lora lr 1.2e-2": {"--lora-rank": "16", "--lora-lr": "0.012"},
    "rank 64, MLP only": {**LORA, "--lora-targets": "gate_proj,up_proj,down_proj"},
    "rank 64, attention only": {**LORA, "--lora-targets": "q_proj,k_proj,v_proj,o_proj"},
    "rank 64, P 0": {**LORA, "--prompt-tokens": "0"},
    "half KL, half hard labels": {"--distill": "0.5"},
    "rank 64, last 15 layers": {**LORA, "--lora-layers": "15-29"},
    "EMA 0.9": {"--ema": "0.9"},
    "P 32": {"--prompt-tokens": "32"},
    "4 sequences of 16 groups": {"--batch-size": "4", "--groups": "16"},
    "k 5, 38 groups": {"--mask-tokens": "5", "--groups": "38"},
    "rank 64, lora lr 1e-3": {**LORA, "--lora-lr": "0.001"},
    "mask decay 0.8": {"--mask-decay": "0.8"},
    "rank 64, hard labels": {**LORA, "--distill": "0"},
    "reach power 0.5": {"--reach-power": "0.5"},
    "rank 64, reach power 0.5": {**LORA, "--reach-power": "0.5"},
}
OTHER_DATA_RUNS = ("other prompts", "own and other prompts")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--other-data", help="adds runs on these samples, and on both files")
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-positions", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/training_ablation.csv")
    )
    args = parser.parse_args()
    if args.model is None:
        from bita_vllm.embedded import embedded_model_dir

        args.model = str(embedded_model_dir())
    torch.set_num_threads(args.threads)
    runs = {name: (options, [args.data]) for name, options in RUNS.items()}
    if args.other_data:
        runs[OTHER_DATA_RUNS[0]] = ({}, [args.other_data])
        runs[OTHER_DATA_RUNS[1]] = ({}, [args.data, args.other_data])
    done = set()
    if args.out.exists():
        done = {row["run"] for row in csv.DictReader(args.out.open(newline=""))}
    for name in tqdm([name for name in runs if name not in done], desc="ablation", unit="run"):
        row = measure(name, *runs[name], args)
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        tqdm.write("  ".join(f"{key} {value}" for key, value in list(row.items())[:8]))


def measure(
    name: str, options: dict[str, str], data: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Train and evaluate one run: its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", args.model, "--data", *data, "--out", f"{folder}/adapter"]
        flags = {**BASE, **options, "--steps": str(args.steps), "--threads": str(args.threads)}
        command += [part for flag in flags.items() for part in flag]
        trainer = make_trainer(make_parser().parse_args(command), Processes())
        start = time.monotonic()
        if not trainer.train():
            raise SystemExit(f"{name} was stopped at step {trainer.step}; it has no row.")
        seconds = time.monotonic() - start
        last = trainer.curve.summary()
        del trainer
        base = load_base(args.model, None, "cpu", "float32")
        model = MaskModel.from_adapter(base, f"{folder}/adapter")
        lora_size = sum(p.numel() for p in model.lora.parameters()) if model.lora else 0
        ranks = answer_ranks(model, read_samples(args.eval_data), args.eval_positions)
    k = ranks[0].shape[1]
    acceptance = acceptance_statistics(ranks)
    accuracy = mask_accuracy(ranks)
    best = best_template(24, k, acceptance)
    trees = {
        "chain": Template.from_widths([1] * k, k),
        "5,4,3": Template.from_widths([5, 4, 3][:k], k),
        "best of 24 rows": best,
    }
    lengths = {tree: accepted_lengths(template, ranks) for tree, template in trees.items()}
    mean = {
        tree: round(sum(map(sum, by_answer)) / sum(map(len, by_answer)), 4)
        for tree, by_answer in lengths.items()
    }
    return {
        "run": name,
        **mean,
        "m1": round(float(accuracy.top[0, 0]), 4),
        "loss": round(last["loss"], 4),
        "delta_parameters": lora_size,
        "seconds": round(seconds),
        "options": " ".join(part for flag in options.items() for part in flag),
        "data": " ".join(Path(path).name for path in data),
        "eval_data": Path(args.eval_data).name,
        "eval_tokens": sum(map(len, ranks)),
        "steps": args.steps,
        "model": Path(args.model).name,
        **provenance(),
    }


if __name__ == "__main__":
    main()

"""Training throughput and peak memory: mask rows over recorded keys against the full-mask way.

Both compute the same loss and gradients (tests/unit/training/test_mask_model.py): ours runs the
tokens once without gradient and then only mask rows; the plain way (tests/naive_training.py) runs
[tokens | mask rows] with gradient under one dense mask. Each runs in a process of its own, for its
peak memory, one after the other and the pair several times over. One CSV row a case and way.

    python benchmarks/training_throughput.py --model MODEL_DIR --cases 4x256x64 1x1024x64
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from provenance import ROOT, provenance

WAYS = ("mask rows only", "full mask")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["4x256x64", "1x1024x64", "1x2048x64"],
        metavar="SEQUENCESxTOKENSxGROUPS",
    )
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=1, help="processes a case and way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="benchmarks/results/training_throughput.csv")
    args = parser.parse_args()
    if args.model is None:
        from bita_vllm.embedded import embedded_model_dir

        args.model = str(embedded_model_dir())
    rows = []
    for case in args.cases:
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                measured[way].append(in_process(way, case, args))
        for way in WAYS:
            row = summary(way, case, args, measured[way])
            rows.append(row)
            print(json.dumps({name: row[name] for name in list(row)[:8]}), flush=True)
        ratio = rows[-2]["mask_rows_per_second"] / rows[-1]["mask_rows_per_second"]
        gap = abs(measured[WAYS[0]][0]["loss"] - measured[WAYS[1]][0]["loss"])
        print(f"{case}: {ratio:.2f} times the full-mask trainer; losses differ by {gap:.1e}")
        write_csv(Path(args.out), rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def in_process(way: str, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (way, case, vars(args)))


def measure(way: str, case: str, args: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, loss of the first, and memory: before any step and at the peak."""
    sys.path.insert(0, str(ROOT / "tests"))
    import naive_training
    import torch
    from transformers import AutoModelForCausalLM

    from bita_vllm.training.batches import make_batch
    from bita_vllm.training.initial import new_model
    from bita_vllm.training.loss import mask_loss, mask_weights
    from bita_vllm.training.mask_lora import MaskLora
    from bita_vllm.training.samples import Sample

    torch.set_num_threads(args["threads"])
    sequences, tokens, groups = map(int, case.split("x"))
    dtype = getattr(torch, args["dtype"])
    base = AutoModelForCausalLM.from_pretrained(args["model"], dtype=dtype)
    rng = random.Random(0)
    vocab_size = base.config.get_text_config().vocab_size
    samples = [
        Sample(rng.choices(range(vocab_size), k=16), rng.choices(range(vocab_size), k=tokens - 16))
        for _ in range(sequences)
    ]
    batch = make_batch(samples, 3, groups, tokens, rng)
    model = new_model(base, 3, 16, 0, samples[0].answer_ids, "")
    if args["lora_rank"]:
        model.add_lora(MaskLora.for_model(base, args["lora_rank"]))
    parameters = list(model.parameters())
    weights = mask_weights(3, 1.0)
    num_rows = int((batch.targets >= 0).sum())

    def mask_rows_only() -> torch.Tensor:
        context = model.context(batch.input_ids)
        hidden = model.mask_hidden(context, batch.roots)
        return mask_loss(model, context, hidden, batch, weights, num_rows, 1.0, 0.0, 256).loss

    def full_mask() -> torch.Tensor:
        lora = model.lora
        trained = naive_training.Weights(*parameters[:3])
        if lora is not None:
            lora.enabled = False
            trained.deltas = {
                name: (a, b, lora.alpha / lora.rank)
                for name, a, b in zip(lora.module_names, lora.lora_a, lora.lora_b, strict=True)
            }
        logits = naive_training.logits(base, trained, batch.input_ids, batch.roots)
        return naive_training.loss(*logits, batch.roots, batch.targets, weights, 1.0)

    step = mask_rows_only if way == WAYS[0] else full_mask
    before = peak_mib()
    seconds, losses = [], []
    for _ in range(1 + args["steps"]):
        start = time.perf_counter()
        loss = step()
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {
        "seconds": seconds[1:],
        "rows": num_rows,
        "loss": losses[0],
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary(
    way: str, case: str, args: argparse.Namespace, results: list[dict[str, Any]]
) -> dict[str, Any]:
    seconds = [second for result in results for second in result["seconds"]]
    median = statistics.median(seconds)
    return {
        "way": way,
        "case": case,
        "mask_rows_per_second": round(results[0]["rows"] / median, 2),
        "sequences_per_second": round(int(case.split("x")[0]) / median, 4),
        "seconds_median": round(median, 3),
        "seconds_min": round(min(seconds), 3),
        "peak_mib": round(max(result["peak_mib"] for result in results)),
        "step_mib": round(max(result["peak_mib"] - result["before_mib"] for result in results)),
        "steps_timed": len(seconds),
        "threads": args.threads,
        "dtype": args.dtype,
        "lora_rank": args.lora_rank,
        "model": Path(args.model).name,
        **provenance(),
    }


if __name__ == "__main__":
    main()

"""Training throughput and peak memory: mask rows over recorded keys against the full-mask way.

Both compute the same loss and gradients (tests/unit/training/test_mask_model.py): ours runs the
tokens once without gradient and then only mask rows; the plain way (testbed/naive_training.py) runs
[tokens | mask rows] with gradient under one dense mask. On a GPU mask rows attend by FlexAttention, and a third way
asks xFormers' memory_efficient_attention for the same. Each runs in a process of its own, for its
peak memory, one after the other and all several times over. One CSV row a case and way, written when measured.

    python benchmarks/training_throughput.py --model MODEL_DIR --cases 4x256x64 1x1024x64
    python benchmarks/training_throughput.py --model CONFIG_DIR --random-weights --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import resource
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from provenance import provenance

OURS, XFORMERS, FULL = "mask rows only", "mask rows, xformers", "full mask"
WAYS = (OURS, XFORMERS, FULL)
FIGURES = ("mask_rows_per_second", "sequences_per_second", "seconds_median", "seconds_min")
FIGURES += ("peak_mib", "step_mib")


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[OURS, FULL])
    parser.add_argument(
        "--random-weights", action="store_true", help="from the model's config alone: large shapes"
    )
    parser.add_argument("--out", default="benchmarks/results/training_throughput.csv")
    args = parser.parse_args()
    if args.model is None:
        from bita_vllm.embedded import embedded_model_dir

        args.model = str(embedded_model_dir())
    rows = []
    for case in args.cases:
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for _ in range(args.rounds):
            for way in args.ways:
                measured[way].append(in_process(way, case, args))
                rows_now = [summary(w, case, args, found) for w, found in measured.items() if found]
                write_csv(Path(args.out), [*rows, *rows_now])
        rows += rows_now
        for row in rows_now:
            print(json.dumps({name: row[name] for name in list(row)[:8]}), flush=True)
            if row["failure"]:
                print(f"unavailable: {row['failure']}", flush=True)
        compare(case, measured)


def compare(case: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Print every other way compared with the trainer's own, where both ran."""
    own = measured.get(OURS, [{}])[0]
    for way, (first, *_) in measured.items():
        if way != OURS and "loss" in own and "loss" in first:
            ratio = rows_per_second(measured[OURS]) / rows_per_second(measured[way])
            gap = abs(own["loss"] - first["loss"])
            print(f"{case}: {ratio:.2f} times '{way}'; losses differ by {gap:.1e}", flush=True)


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
    """Seconds of each step, loss of the first, and memory; or why this way does not run here."""
    try:
        if way != XFORMERS:
            return measure_steps(way, case, args)
        from training_xformers import in_place_of_flex, xformers_kernel

        with in_place_of_flex(xformers_kernel()):
            return measure_steps(way, case, args)
    except (ImportError, NotImplementedError, MemoryError, RuntimeError) as error:
        return {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


def measure_steps(way: str, case: str, args: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, loss of the first, and memory: before any step and at the peak."""
    import torch
    from testbed import naive_training

    from bita_vllm.training.batches import make_batch
    from bita_vllm.training.initial import new_model
    from bita_vllm.training.loss import mask_loss, mask_weights
    from bita_vllm.training.mask_lora import MaskLora
    from bita_vllm.training.samples import Sample

    torch.set_num_threads(args["threads"])
    sequences, tokens, groups = map(int, case.split("x"))
    dtype = getattr(torch, args["dtype"])
    device = torch.device(args["device"])
    base = base_model(args, dtype, device)
    rng = random.Random(0)
    vocab_size = base.config.get_text_config().vocab_size
    samples = [
        Sample(rng.choices(range(vocab_size), k=16), rng.choices(range(vocab_size), k=tokens - 16))
        for _ in range(sequences)
    ]
    batch = make_batch(samples, 3, groups, tokens, rng)
    batch = replace(batch, **{
        field.name: getattr(batch, field.name).to(device) for field in fields(batch)
    })  # fmt: skip
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

    step = full_mask if way == FULL else mask_rows_only
    before = peak_mib(device)
    seconds, losses = [], []
    for _ in range(1 + args["steps"]):
        synchronize(device)
        start = time.perf_counter()
        loss = step()
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {
        "seconds": seconds[1:],
        "rows": num_rows,
        "loss": losses[0],
        "before_mib": before,
        "peak_mib": peak_mib(device),
    }


def base_model(args: dict[str, Any], dtype: Any, device: Any) -> Any:
    """The base model on its device; random weights are made there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not args["random_weights"]:
        return AutoModelForCausalLM.from_pretrained(args["model"], dtype=dtype).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(args["model"]), dtype=dtype
        )


def synchronize(device: Any) -> None:
    """Wait for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(device: Any) -> float:
    """Most memory so far: the GPU's, or this process's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows_per_second(results: list[dict[str, Any]]) -> float:
    """Mask rows a second at the median step."""
    median = statistics.median(second for result in results for second in result["seconds"])
    return results[0]["rows"] / median


def device_name(device: str) -> str:
    """The GPU's name; '' on a CPU, whose name is in every row."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def summary(
    way: str, case: str, args: argparse.Namespace, results: list[dict[str, Any]]
) -> dict[str, Any]:
    done = [result for result in results if "failure" not in result]
    seconds = [second for result in done for second in result["seconds"]]
    figures: dict[str, Any] = dict.fromkeys(FIGURES, "")
    if done:
        median = statistics.median(seconds)
        figures = {
            "mask_rows_per_second": round(rows_per_second(done), 2),
            "sequences_per_second": round(int(case.split("x")[0]) / median, 4),
            "seconds_median": round(median, 3),
            "seconds_min": round(min(seconds), 3),
            "peak_mib": round(max(result["peak_mib"] for result in done)),
            "step_mib": round(max(result["peak_mib"] - result["before_mib"] for result in done)),
        }
    return {
        "way": way,
        "case": case,
        **figures,
        "failure": next((result["failure"] for result in results if "failure" in result), ""),
        "steps_timed": len(seconds),
        "threads": args.threads,
        "training_device": device_name(args.device),
        "dtype": args.dtype,
        "lora_rank": args.lora_rank,
        "model": Path(args.model).name,
        **provenance(),
    }


if __name__ == "__main__":
    main()

"""Cost of a delta for mask rows in a linear layer on a CPU: our kernel, its twin in torch, and vLLM's own LoRA.

All take a step of blocks with 11 mask rows of 16 each and add the same delta; their outputs are compared
before they are timed. vLLM's takes an adapter's number for each row, -1 for none. The control is the layer
itself. The layers are SmolLM2-135M's, fused as vLLM fuses them. One CSV row a layer, way and number of requests.

    python benchmarks/mask_lora_cpu.py --requests 1 2 8
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bita_kernels import cpu_kernels
from bita_kernels.add_mask_lora_cpu_naive import pack_mask_lora
from bita_kernels.add_mask_lora_naive import add_mask_lora_naive
from provenance import provenance
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

NUM_LAYERS = 30
# fused layer -> (input features, output features of each part)
LAYERS = {
    "qkv_proj": (576, (576, 192, 192)),
    "o_proj": (576, (576,)),
    "gate_up_proj": (576, (1536, 1536)),
    "down_proj": (1536, (576,)),
}
NUM_ROWS, NUM_MASK_ROWS = 16, 11
WAYS = ("layer", "add_mask_lora", "in torch", "vLLM LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mask_lora_cpu.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not cpu_kernels.register():
        raise SystemExit("mask_lora_cpu: the kernel could not be built, see above; install g++.")
    rows = []
    for num_requests in args.requests:
        total = dict.fromkeys(WAYS, 0.0)
        for layer in LAYERS:
            times = measure(ways(layer, num_requests, args.rank), args.repeats)
            for way, seconds in times.items():
                median = statistics.median(seconds)
                total[way] += NUM_LAYERS * median
                rows.append(
                    {
                        "layer": layer,
                        "requests": num_requests,
                        "rows": NUM_ROWS * num_requests,
                        "mask_rows": NUM_MASK_ROWS * num_requests,
                        "rank": args.rank,
                        "dtype": "float32",
                        "threads": args.threads,
                        "way": way,
                        "median_us": round(1e6 * median, 1),
                        "least_us": round(1e6 * min(seconds), 1),
                        "repeats": args.repeats,
                        **provenance(),
                    }
                )
        shown = ", ".join(f"{way} {1e3 * seconds:.1f} ms" for way, seconds in total.items())
        print(f"{num_requests} requests, all {NUM_LAYERS} layers: {shown}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def ways(layer: str, num_requests: int, rank: int) -> dict[str, Callable[[], None]]:
    """Way -> what it does in one step, on the same random tensors."""
    inputs, parts = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    num_rows = NUM_ROWS * num_requests
    first = torch.arange(num_requests) * NUM_ROWS + NUM_ROWS - NUM_MASK_ROWS
    mask_rows = (first[:, None] + torch.arange(NUM_MASK_ROWS)).flatten()
    x, weight = random(num_rows, inputs), random(sum(parts), inputs)
    a, b = [random(rank, inputs) for _ in parts], [random(size, rank) for size in parts]
    ends = torch.tensor(parts).cumsum(0)
    columns = torch.stack([ends - torch.tensor(parts), ends], dim=1).int()
    stacked_a, stacked_b, count = torch.cat(a), torch.cat(b), torch.tensor([len(mask_rows)])

    punica = PunicaWrapperCPU(num_rows, num_rows, "cpu")
    punica._token_lora_indices.fill_(-1)
    punica._token_lora_indices[mask_rows] = 0
    punica.indices_len[0], punica.is_prefill = num_rows, False
    # The last adapter is all zeros: index -1 reads it.
    punica_a = tuple(torch.stack([t, torch.zeros_like(t)])[:, None] for t in a)
    punica_b = tuple(torch.stack([t, torch.zeros_like(t)])[:, None] for t in b)

    packed = pack_mask_lora(stacked_a, stacked_b, columns)

    def ours(output: torch.Tensor) -> None:
        torch.ops.bita.add_mask_lora_cpu(output, x, *packed, columns, mask_rows, count)

    def twin(output: torch.Tensor) -> None:
        add_mask_lora_naive(output, x, stacked_a, stacked_b, columns, mask_rows, count)

    def vllms(output: torch.Tensor) -> None:
        punica.add_lora_linear(output, x, punica_a, punica_b, 1.0, parts)

    added = {"add_mask_lora": ours, "in torch": twin, "vLLM LoRA": vllms}
    outputs = [torch.zeros(num_rows, sum(parts)) for _ in added]
    for way, output in zip(added.values(), outputs, strict=True):
        way(output)
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)
    scratch = torch.zeros(num_rows, sum(parts))
    return {
        "layer": lambda: torch.nn.functional.linear(x, weight),
        **{name: partial(way, scratch) for name, way in added.items()},
    }


def measure(run: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, the ways in turn."""
    times: dict[str, list[float]] = {way: [] for way in run}
    for repeat in range(repeats + 2):
        for way, function in run.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:  # the first ones warm up
                times[way].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()

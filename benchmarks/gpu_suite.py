"""All that one wants to know of BiTA on a GPU, in one command of about eight minutes: `make gpu-suite`.

correctness  embedded model in bf16 and a tiny random one in fp32: tokens beside plain vLLM's
kernels      tree attention beside its peers (benchmarks/kernels.py, fewer points)
steps        what an engine step costs against rows, requests and context; shapes of large models, dummy weights
throughput   output tokens per second beside plain vLLM, graphs and async scheduling on

Every engine has a process of its own, so a failure costs one arm. One CSV a part; the table comes last.
`--dry` runs the same code on a CPU through Triton's interpreter: tiny numbers that say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_throughput as shared
from cpu_engines import measure
from provenance import ROOT, provenance

PARTS = ("correctness", "kernels", "steps", "throughput")
RESULTS = ROOT / "benchmarks" / "results"
NUM_MASKS = 3
# arm -> tree of an adapter without statistics; with three masks a block has 4 * (1 + nodes) rows
ARMS = {"plain": None, "bita 16 rows": "2,1", "bita 52 rows": "5,4,3"}
# in correctness only, to compare with prefill in FlashAttention
TRITON_PREFILL = "bita 16 rows, prefill in Triton"
ARMS[TRITON_PREFILL] = ARMS["bita 16 rows"]
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "Qwen3-4B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
        "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
KERNELS = {
    False: "--context 4096 32768 --requests 1 8 64 --rows 1 16 52 --shape Llama-3-8B/Qwen3-4B",
    True: "--context 64 --requests 1 --rows 4 --shape SmolLM2-135M --device cpu",
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    prompts: int
    max_tokens: int
    concurrency: tuple[int, ...]
    contexts: tuple[int, ...]
    requests: tuple[int, ...]
    steps: int
    limit: int  # seconds that an arm may take
    arms: tuple[str, ...] = tuple(arm for arm in ARMS if arm != TRITON_PREFILL)


FULL = Size(32, 64, (1, 8, 32, 128), (512, 4096, 16384), (1, 8), 32, 150)
DRY = Size(3, 6, (1, 2), (8,), (1,), 4, 60, ("plain", "bita 16 rows"))


# --- One arm: an engine in this process -----------------------------------------------------------


@contextmanager
def engine(
    model: Path, adapter: Path, arm: str, args: argparse.Namespace, **options: Any
) -> Iterator[Any]:
    """vLLM's engine for an arm; with `--dry` the V2 runner interpreted, as the tests have it."""
    speculative = None if arm == "plain" else {"model": str(adapter), **block(adapter, arm)}
    if args.dry:
        from e2e import engines

        small = {"max_model_len": 64, "max_num_seqs": 2, "num_gpu_blocks_override": 8}
        with engines.engine(model, speculative, **{**options, **small, "dtype": "float32"}) as llm:
            yield llm.llm_engine
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from bita_vllm import plugin

    plugin.register()  # also where the package is on the path, but not installed
    if arm == TRITON_PREFILL:
        from bita_vllm.attention import prefill

        prefill.VERSIONS = ()
    if args.gpu_memory_utilization:
        options["gpu_memory_utilization"] = args.gpu_memory_utilization
    if speculative:
        options["speculative_config"] = {"method": "bita", **speculative}
    elif args.plain_backend:
        options["attention_backend"] = args.plain_backend
    llm = LLM(str(model), enable_prefix_caching=False, async_scheduling=True, **options)
    try:
        yield llm.llm_engine
    finally:
        llm.llm_engine.engine_core.shutdown()


def block(adapter: Path, arm: str) -> dict[str, Any]:
    """An adapter with statistics has its own trees for an arm's rows: what users get by default."""
    from bita_vllm.adapter import AdapterConfig

    if AdapterConfig.load(adapter).acceptance:
        return {"num_speculative_tokens": int(arm.split()[1]) - 1}
    return {"tree": ARMS[arm]}


def greedy(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def finished(core: Any, prompts: list[list[int]], params: Any) -> list[Any]:
    """The completions, in order."""
    for i, prompt in enumerate(prompts):
        core.add_request(str(i), {"prompt_token_ids": prompt}, params)
    outputs = {}
    while core.has_unfinished_requests():
        outputs |= {int(o.request_id): o.outputs[0] for o in core.step() if o.finished}
    return [outputs[i] for i in range(len(prompts))]


def some_prompts(number: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids from a fixed rule, none of them special."""
    return [[3 + (31 * i + 7 * n) % (vocab_size - 3) for n in range(length)] for i in range(number)]


def correctness(case: str, arm: str, size: Size, args: argparse.Namespace) -> list[dict[str, Any]]:
    model, adapter = args.models[case]
    if case == "tiny":
        prompts, dtype = some_prompts(size.prompts, 12, 512), "float32"
    else:
        prompts, dtype = shared.load_prompts(str(model))[: size.prompts], "bfloat16"
    options = {"dtype": dtype, "max_model_len": 1024, "max_num_seqs": size.prompts}
    with engine(model, adapter, arm, args, **options) as core:
        completions = finished(core, prompts, greedy(size.max_tokens, logprobs=2))
        layers = core.vllm_config.compilation_config.static_forward_context.values()
        flash = {getattr(layer.impl, "flash", None) is not None for layer in layers}
    prefill = " and ".join("FlashAttention" if used else "Triton" for used in sorted(flash))
    rows = []
    for completion in completions:
        tops = [
            sorted((p.logprob for p in top.values()), reverse=True) for top in completion.logprobs
        ]
        gaps = [round(top[0] - top[1], 5) for top in tops]
        rows.append({"tokens": list(completion.token_ids), "gaps": gaps, "prefill": prefill})
    return rows


def steps(case: str, arm: str, size: Size, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median time of an engine step while every request decodes."""
    model, adapter = args.models[case]
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    rows_each = 1 if ARMS[arm] is None else int(arm.split()[1])
    options: dict[str, Any] = {} if args.dry else {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(size.contexts) + 512,
        "max_num_seqs": max(size.requests),
        "dtype": "bfloat16",
        # No compilation, in every arm: it would take most of the time.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [n * rows_each for n in size.requests],
        },
    }  # fmt: skip
    rows = []
    with engine(model, adapter, arm, args, **options) as core:
        for context in size.contexts:
            for number in size.requests:
                prompts = some_prompts(number, context, vocab_size)
                times = step_times(
                    core, prompts, greedy(8 * size.steps, detokenize=False), size.steps
                )
                ms = 1e3 * statistics.median(times)
                rows.append({"context": context, "requests": number, "step_ms": round(ms, 3)})
    return rows


def step_times(core: Any, prompts: list[list[int]], params: Any, number: int) -> list[float]:
    """Seconds of steps in which all requests decode; the requests are dropped then."""
    names = [str(i) for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        core.add_request(name, {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    times: list[float] = []
    while len(times) < number + 4 and core.has_unfinished_requests():
        decoding, begun = len(started) == len(names), time.perf_counter()
        started |= {output.request_id for output in core.step()}
        if decoding:
            times.append(time.perf_counter() - begun)
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()
    return times[4:] or times


def throughput(case: str, arm: str, size: Size, args: argparse.Namespace) -> list[dict[str, Any]]:
    model, adapter = args.models[case]
    prompts = some_prompts(8, 8, 512) if args.dry else shared.load_prompts(str(model))
    most = max(size.concurrency)
    options = {"max_model_len": 1024, "max_num_seqs": most, "dtype": "bfloat16"}
    rows = []
    with engine(model, adapter, arm, args, **options) as core:
        for concurrency in size.concurrency:
            chosen = shared.rotate(prompts, 0, 2 * concurrency)
            if not args.dry:
                measure(core, concurrency, chosen[:concurrency], 16)  # warm
            measured = measure(core, concurrency, chosen, size.max_tokens)
            rows.append({
                "concurrency": concurrency,
                "tokens_per_second": round(measured.tokens_per_second, 1),
                "accepted_length": round(measured.accepted_length, 3),
                "step_ms": round(measured.step_ms, 3),
                "outputs": measured.outputs,
            })  # fmt: skip
    return rows


MEASURE = {"correctness": correctness, "steps": steps, "throughput": throughput}
CASES = {
    "correctness": {False: ("tiny", "embedded"), True: ("tiny",)},
    "steps": {False: tuple(SHAPES), True: ("tiny",)},
    "throughput": {False: ("embedded",), True: ("tiny",)},
}


ALL_CASES = sorted({case for sizes in CASES.values() for case in sizes[False]})


# --- All arms: a process each ---------------------------------------------------------------------


def run_arm(
    part: str, case: str, arm: str, args: argparse.Namespace
) -> list[dict[str, Any]] | None:
    """Rows of one arm, or None with the reason on the terminal."""
    size = DRY if args.dry else FULL
    print(f"{part}: {case}, {arm}", flush=True)
    if args.dry:  # one process: starting Python and vLLM takes longer than the arm
        return MEASURE[part](case, arm, size, args)
    log = args.scratch / f"{part}-{case}-{arm}.log".replace(" ", "-")
    out = log.with_suffix(".json")
    command = [sys.executable, __file__, *sys.argv[1:], "--child", part, case, arm, str(out)]
    with log.open("w") as file:
        try:
            subprocess.run(command, stdout=file, stderr=file, timeout=size.limit, check=True)
            return json.loads(out.read_text())
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            print(f"{tail}\n{part}: {case}, {arm} failed ({type(error).__name__}); log: {log}")
            return None


def run_part(part: str, args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the terminal; the CSV is written."""
    rows: list[dict[str, Any]] = []
    for case in args.case or CASES[part][args.dry]:
        plain: list[dict[str, Any]] | None = None
        arms = (DRY if args.dry else FULL).arms
        if (part, case) == ("correctness", "embedded"):  # fp32 has no FlashAttention
            arms += (TRITON_PREFILL,)
        for arm in arms:
            measured = run_arm(part, case, arm, args)
            plain = measured if arm == "plain" else plain
            if measured is None:
                args.failed.append(f"{part} {case} {arm}")
            else:
                rows += beside_plain(part, case, arm, measured, plain)
    if rows:
        shared.write_csv(args.out / f"gpu_{part}.csv", [{**row, **args.facts} for row in rows])
    return list(rows[0]) if rows else [], [[str(value) for value in row.values()] for row in rows]


def beside_plain(
    part: str, case: str, arm: str, rows: list[dict[str, Any]], plain: list[dict[str, Any]] | None
) -> Iterator[dict[str, Any]]:
    """An arm's rows with plain vLLM's figure next to them."""
    if part == "correctness":
        if arm != "plain":
            prefill = rows[0]["prefill"]
            yield {"case": case, "arm": arm, "prefill": prefill, **differences(rows, plain or [])}
        return
    figure = "step_ms" if part == "steps" else "tokens_per_second"
    for i, row in enumerate(rows):
        base = plain[i] if plain else None
        line = {"case": case, "arm": arm, **{k: v for k, v in row.items() if k != "outputs"}}
        line["to_plain"] = round(row[figure] / base[figure], 3) if base else ""
        if part == "throughput":
            same = (
                [a == b for a, b in zip(row["outputs"], base["outputs"], strict=True)]
                if base
                else []
            )
            line["identical"] = f"{sum(same)}/{len(same)}"
        yield line


def differences(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """How many outputs are plain vLLM's; where the others leave it, the gap of plain's two best logprobs."""
    found = []
    for row, base in zip(rows, plain, strict=False):
        pairs = enumerate(zip(row["tokens"], base["tokens"], strict=True))
        place = next((n for n, (a, b) in pairs if a != b), None)
        if place is not None:
            found.append((place, base["tokens"][place], row["tokens"][place], base["gaps"][place]))
    return {
        "prompts": len(plain),
        "identical": len(plain) - len(found),
        "largest_gap": max((gap for *_, gap in found), default=0.0),
        "position_plain_bita_gap": " ".join(":".join(map(str, entry)) for entry in found),
    }


def run_kernels(args: argparse.Namespace) -> None:
    """benchmarks/kernels.py prints its own table and writes its own CSV."""
    out = args.out / ("kernels_dry.csv" if args.dry else "gpu_kernels.csv")
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *KERNELS[args.dry].split()]
    limit = DRY.limit if args.dry else FULL.limit
    try:
        subprocess.run([*command, "--out", str(out)], timeout=limit, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"kernels failed ({type(error).__name__}).")
        args.failed.append("kernels")


def make_models(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """case -> model and adapter; made in the scratch folder, but for the embedded model."""
    from bita_vllm.adapter import ModelShape, random_adapter, save_adapter

    made: dict[str, tuple[Path, Path]] = {}
    scratch: Path = args.scratch
    for name, config in ({} if args.dry else SHAPES).items():
        folder = scratch / name
        folder.mkdir(exist_ok=True)
        content = {
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        made[name] = folder, folder / "adapter"
    from tiny_models import make_tiny_model

    folder = scratch / "tiny"
    if not folder.exists():
        make_tiny_model(folder, "llama", num_hidden_layers=1 if args.dry else 3)
    made["tiny"] = folder, folder / "adapter"
    for folder, adapter in made.values():
        if not adapter.exists():
            config = json.loads((folder / "config.json").read_text())
            shape = ModelShape.from_hf_config(config)
            save_adapter(adapter, random_adapter(
                shape, NUM_MASKS, 16, 0, embedding_std=0.15, prompt_std=0.5, verifier=str(folder)
            ))  # fmt: skip
    if not args.dry and any("embedded" in CASES[p][False] for p in args.part if p in CASES):
        from bita_vllm.embedded import embedded_model_dir

        made["embedded"] = args.model or embedded_model_dir(), args.adapter
    return made


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--case", nargs="+", choices=ALL_CASES, help="of the parts (default: all of a part)")
    add(
        "--dry",
        action="store_true",
        help="tiny, interpreted, on a CPU: does the suite run to its end?",
    )
    add("--model", type=Path, help="for the embedded model's parts (default: the embedded model)")
    add(
        "--adapter",
        type=Path,
        default=shared.ADAPTER,
        help="its adapter (default: the shipped one)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        help="each engine's share of the GPU, where something else runs there too (default: vLLM's)",
    )
    add("--plain-backend", help="attention backend of plain vLLM (default: vLLM's own choice)")
    add(
        "--out", type=Path, default=RESULTS, help="folder of the CSVs (default: benchmarks/results)"
    )
    add("--scratch", type=Path, help=argparse.SUPPRESS)
    add("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if args.dry:
        import v2_on_cpu

        v2_on_cpu.install()
    if args.child:
        part, case, arm, out = args.child
        args.models = make_models(args)
        Path(out).write_text(json.dumps(MEASURE[part](case, arm, FULL, args)))
        return
    begun, tables = time.perf_counter(), []
    args.failed, args.facts = [], provenance()
    with tempfile.TemporaryDirectory(prefix="bita-gpu-suite-") as scratch:
        if args.scratch is None:
            args.scratch = Path(scratch)
            sys.argv += ["--scratch", scratch]
        if not args.dry:
            import torch

            args.facts["device"] = torch.cuda.get_device_name()
        args.models = make_models(args)
        for part in args.part:
            try:
                if part == "kernels":
                    run_kernels(args)
                else:
                    tables.append((part, *run_part(part, args)))
            except Exception:  # the other parts go on
                traceback.print_exc()
                args.failed.append(part)
    for part, header, rows in tables:
        if rows:
            print(f"\n{part}\n{shared.table(header, rows)}")
    print(f"\n{args.facts['device']}: {time.perf_counter() - begun:.0f} s; CSVs in {args.out}")
    if args.failed:
        sys.exit(f"failed: {', '.join(args.failed)}")


if __name__ == "__main__":
    main()

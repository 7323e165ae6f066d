"""Steps of a real engine beside a neighbour that takes half a core in bursts: what the policy's tests replay.

Writes `[steps, 2]` float32: seconds over the median of the quiet steps, CPU seconds a second. The machine has to be
quiet otherwise: the first steps are the yardstick.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from tqdm import tqdm

OUT = Path(__file__).parents[1] / "tests" / "data" / "noisy_steps.npz"
CONTEXT = 256  # tokens; then the next request: attention takes about as long all the time
BURST, PAUSE = (1.0, 4.0), (1.0, 4.0)  # seconds, from and to: half of the time


def neighbour(stop: Event) -> None:
    """One core, in bursts, until told to stop."""
    rng = random.Random(0)
    while not stop.wait(rng.uniform(*PAUSE)):
        end = time.monotonic() + rng.uniform(*BURST)
        while time.monotonic() < end:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiet-seconds", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="beside the neighbour")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are timed in this process
    from vllm import LLM, SamplingParams

    from bita_vllm.embedded import embedded_model_dir
    from bita_vllm.training.base_model import choose_dtype

    llm = LLM(
        str(embedded_model_dir()),
        dtype=choose_dtype("auto", "cpu"),
        max_model_len=CONTEXT,
        kv_cache_memory_bytes=1 << 28,
    )
    engine, number = llm.llm_engine, 0
    params = SamplingParams(
        temperature=0.0, max_tokens=CONTEXT - 8, ignore_eos=True, detokenize=False
    )

    def steps(seconds: float, what: str) -> np.ndarray:
        """`[steps, 2]` seconds and CPU seconds of decode steps, one request at a time."""
        nonlocal number
        found: list[tuple[float, float]] = []
        begin = time.monotonic()
        with tqdm(desc=what, unit="step") as bar:
            while time.monotonic() - begin < seconds:
                if not engine.has_unfinished_requests():
                    number += 1
                    engine.add_request(str(number), {"prompt_token_ids": list(range(1, 9))}, params)
                    engine.step()  # its prefill
                start, cpu_start = time.perf_counter(), time.process_time()
                engine.step()
                found.append((time.perf_counter() - start, time.process_time() - cpu_start))
                bar.update()
        return np.array(found)

    steps(args.quiet_seconds, "warming up")
    quiet = statistics.median(steps(args.quiet_seconds, "quiet")[:, 0])
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    process = spawn.Process(target=neighbour, args=(stop,), daemon=True)
    process.start()
    try:
        noisy = steps(args.seconds, "beside the neighbour")
    finally:
        stop.set()
        process.join()
    noise = np.stack([noisy[:, 0] / quiet, noisy[:, 1] / noisy[:, 0]], axis=1).astype(np.float32)
    np.savez_compressed(args.out, noise=noise, quiet_seconds=quiet)
    print(
        f"written: {args.out}, {len(noise)} steps; quiet ones took {1e3 * quiet:.1f} ms, these at the median "
        f"{np.median(noise[:, 0]):.2f} times that, at the 90th percentile {np.quantile(noise[:, 0], 0.9):.2f}"
    )


if __name__ == "__main__":
    main()

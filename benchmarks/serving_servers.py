"""Arms and servers of `serving.py`: a `vllm serve` process for each arm, loaded by `vllm bench serve`'s own code."""

import argparse
import asyncio
import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_engines import NO_DRAFTS
from serving_report import PLAIN
from testbed.server_process import ServerProcess

START_TIMEOUT_S = 1200  # the first start of an arm compiles


@dataclass(frozen=True)
class Arm:
    """One server's speculative config, as for `--speculative-config`; plain vLLM has none."""

    name: str
    config: dict[str, Any]


def all_arms(adapter: str, ladder: str | None) -> list[Arm]:
    bita = {"method": "bita", "model": adapter}
    own = {"ladder": ladder} if ladder else {}
    ngram = {"num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    return [
        Arm(PLAIN, {}),
        Arm("bita-52", {**bita, "tree": "5,4,3"}),
        Arm("bita-chain", {**bita, "tree": "1,1,1"}),
        Arm("bita-no-drafts", {**bita, "ladder": str(NO_DRAFTS)}),
        Arm("bita-auto", {**bita, **own}),
        Arm("bita-masks", {**bita, **own, "copies": False}),
        Arm("bita-copies", {"method": "bita"}),  # no adapter; on a CPU
        Arm("ngram", {"method": "ngram", **ngram}),
        # Prompts come again at every concurrency: answers of earlier ones must not be in its cache.
        Arm("suffix", {"method": "suffix", "suffix_decoding_max_cached_requests": 0}),
    ]


ARM_NAMES = [arm.name for arm in all_arms("", None)]


def bita_rows(arm: Arm, concurrency: int) -> int | None:
    """Rows of a step block at that many requests, as serving chooses them; None for other methods."""
    if arm.config.get("method") != "bita":
        return None
    from bita_vllm.adapter.checkpoint import resolve_adapter_dir
    from bita_vllm.adapter.config import AdapterConfig
    from bita_vllm.scheduling.copy_rows import copy_ladder
    from bita_vllm.scheduling.default_rows import Machine, default_ladder
    from bita_vllm.scheduling.row_options import choose_ladder
    from bita_vllm.system.platform import device_name, on_gpu

    machine = Machine.here(on_gpu())
    if "model" not in arm.config:
        ladder, _ = copy_ladder(arm.config, machine)
    else:
        adapter = AdapterConfig.load(resolve_adapter_dir(arm.config["model"]))
        _, ladder = choose_ladder(
            arm.config, adapter, device_name(), lambda: default_ladder(adapter, machine)
        )
    return int(ladder.lookup(concurrency)[concurrency]) + 1


class Servers:
    """The servers that are up, by arm; one is loaded at a time."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, logs: Path) -> None:
        self._args, self._tokenizer, self._logs = args, tokenizer, logs
        self._up: dict[str, ServerProcess] = {}

    def start(self, arm: Arm, warm_up: Sequence[Any]) -> None:
        """Start the arm's server and warm it up, one request alone and then all. Raises ServerError."""
        flags = list(self._args.server_flags)
        if arm.config:
            flags += ["--speculative-config", json.dumps(arm.config)]
        log = self._logs / f"{arm.name}.log"
        server = self._up[arm.name] = ServerProcess(arm.name, self._args.model, flags, log)
        server.wait_until_healthy(START_TIMEOUT_S)
        self.load(arm, warm_up[:1], 1)
        self.load(arm, warm_up, len(warm_up))

    def is_up(self, arm: Arm) -> bool:
        return arm.name in self._up

    def stop(self, *arms: Arm) -> None:
        """Stop these arms' servers, or all."""
        for name in [arm.name for arm in arms] or list(self._up):
            self._up.pop(name).stop()

    def load(self, arm: Arm, requests: Sequence[Any], concurrency: int) -> dict[str, Any]:
        """`vllm bench serve`'s result; keys as in its JSON file. Raises ServerError."""
        from vllm.benchmarks.serve import TaskType, benchmark

        server = self._up[arm.name]
        with contextlib.redirect_stdout(io.StringIO()):
            result = asyncio.run(
                benchmark(
                    task_type=TaskType.GENERATION,
                    endpoint_type="openai",
                    api_url=f"{server.url}/v1/completions",
                    base_url=server.url,
                    model_id=self._args.model,
                    model_name=self._args.model,
                    tokenizer=self._tokenizer,
                    input_requests=list(requests),
                    logprobs=None,
                    request_rate=float("inf"),
                    burstiness=1.0,
                    disable_tqdm=True,
                    num_warmups=0,
                    profile=False,
                    selected_percentile_metrics=["ttft", "tpot"],
                    selected_percentiles=[50, 99],
                    ignore_eos=False,
                    goodput_config_dict={},
                    max_concurrency=concurrency,
                    lora_modules=None,
                    extra_headers=None,
                    extra_body={"temperature": 0.0},
                    ready_check_timeout_sec=0,  # its test request would be in the metrics
                )
            )
        if result["failed"]:
            first = next(error for error in result["errors"] if error)
            raise server.error(f"failed {result['failed']} requests ({first.strip()[-300:]})")
        return result

"""Installing the plugin changes nothing for a plain run; asking for bita costs little memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ADAPTER = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"
MEMORY_LIMIT = 64 << 20

# What may be loaded in a process that does not ask for bita: the entry point and what it checks.
PLUGIN_MODULES = {
    "bita_vllm",
    *(f"bita_vllm.{name}" for name in ("plugin", "patches", "support", "hooks")),
    *(f"bita_vllm.hooks.{name}" for name in ("hook", "check", "cpu", "gpu", "deltas")),
}

# Run as a script of its own: a plain engine, or one with bita; prints one line of JSON.
PROBE = """
import json, sys
from vllm import LLM, SamplingParams

def look(worker):
    import sys
    import numpy as np
    import torch
    runner = worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
    added = {}
    for name in ("prompt_keys", "prompt_values"):
        tensors = [getattr(impl, name) for impl in impls if hasattr(impl, name)]
        added[name] = sum(tensor.nbytes for tensor in tensors)
    model = getattr(runner, "_block_model", runner.model)
    masks = [m.mask_embeddings for m in model.modules() if hasattr(m, "mask_embeddings")]
    added["mask_embeddings"] = sum(tensor.nbytes for tensor in masks)
    layers = [m for m in model.modules() if hasattr(m, "mask_lora_a")]
    added["deltas"] = sum(m.mask_lora_a.nbytes + m.mask_lora_b.nbytes for m in layers)
    holders = [getattr(runner, "table", None)]
    holders += [vars(holder).get("template") for holder in holders if holder is not None]
    arrays = [v for h in holders if h is not None for v in vars(h).values()]
    added["step tables"] = sum(a.nbytes for a in arrays if isinstance(a, np.ndarray | torch.Tensor))
    return {
        "classes": sorted({f"{type(o).__module__}.{type(o).__name__}"
                           for o in (worker, runner, runner.sampler, *impls)}),
        "modules": sorted(name for name in sys.modules if name.startswith("bita")),
        "added": added,
    }

if __name__ == "__main__":
    model, dtype, speculative_config = json.loads(sys.argv[1])
    llm = LLM(model, dtype=dtype, max_model_len=256, max_num_seqs=8, seed=0, enforce_eager=True,
              kv_cache_memory_bytes=64 << 20, speculative_config=speculative_config)
    sampling = [
        SamplingParams(temperature=0, max_tokens=24, logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.8, seed=7, max_tokens=24, logprobs=2),
        SamplingParams(temperature=1.2, min_p=0.05, seed=1, presence_penalty=0.5, max_tokens=24,
                       logit_bias={5: 1.5}, logprobs=2),
    ]
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (3, 9, 40)]
    outputs = llm.generate(prompts, sampling)
    config = llm.llm_engine.vllm_config
    scheduler = config.scheduler_config.get_scheduler_cls()
    print("PROBE " + json.dumps({
        "outputs": repr([output.outputs for output in outputs]),
        "config": repr(config),
        "parts": {name: repr(part) for name, part in vars(config).items()},
        "hash": config.compute_hash(),
        "scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
        "frontend modules": sorted(name for name in sys.modules if name.startswith("bita")),
        "worker": llm.collective_rpc(look)[0],
    }))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    script = tmp_path_factory.mktemp("probe") / "probe.py"
    script.write_text(PROBE)

    def run(model, dtype="float32", speculative_config=None, **environment):
        env = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment}
        command = [sys.executable, script, json.dumps([str(model), dtype, speculative_config])]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-6000:]
        answer = next(li for li in done.stdout.splitlines() if li.startswith("PROBE "))
        return json.loads(answer.removeprefix("PROBE ")), log

    return run


def test_a_plain_run_is_the_same_with_and_without_the_plugin(probe, tiny_model):
    """Outputs byte for byte, start-up config, classes; only the plugin's own modules are loaded."""
    model = tiny_model("llama")
    (with_plugin, _), (without, _) = probe(model), probe(model, VLLM_PLUGINS="")

    assert "bita_vllm.plugin" in with_plugin["worker"]["modules"]  # else it tests nothing
    assert without["worker"]["modules"] == without["frontend modules"] == []

    assert with_plugin["outputs"] == without["outputs"]
    for name, part in without["parts"].items():
        if name != "instance_id":  # drawn at random in every run
            assert with_plugin["parts"][name] == part, name
    configs = [
        run["config"].replace(run["parts"]["instance_id"], "") for run in (with_plugin, without)
    ]
    assert configs[0] == configs[1]
    assert with_plugin["hash"] == without["hash"]
    assert with_plugin["scheduler"] == without["scheduler"]
    assert with_plugin["worker"]["classes"] == without["worker"]["classes"]
    assert not any("bita" in name for name in with_plugin["worker"]["classes"])
    assert set(with_plugin["worker"]["modules"]) <= PLUGIN_MODULES
    assert sum(with_plugin["worker"]["added"].values()) == 0


def test_bita_adds_less_than_64_mib_to_the_embedded_model(probe, embedded_model):
    """By its tensors, and by what the start-up line says."""
    config = {"method": "bita", "model": str(ADAPTER), "num_speculative_tokens": 15}
    answer, log = probe(embedded_model, speculative_config=config)
    added = answer["worker"]["added"]
    assert all(added.values()), added
    said = float(re.search(r"bita: adapter .* ([\d.]+) MiB added", log)[1])
    print(f"added: {added}; the start-up line says {said} MiB")
    assert sum(added.values()) < MEMORY_LIMIT
    assert said == pytest.approx(sum(added.values()) / 2**20, abs=0.5)

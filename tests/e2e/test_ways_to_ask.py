"""The five ways to ask for bita end up with the same settings, in the frontend and beyond."""

import json
from dataclasses import replace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bita_vllm import plugin
from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.step.settings import get_settings

plugin.register()

TREE = "2,1"
TOKENS = 30


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_model("llama")
    text_config = json.loads((base / "config.json").read_text())
    adapter = random_adapter(
        ModelShape.from_hf_config(text_config),
        num_mask_tokens=3,
        num_prompt_tokens=4,
        seed=0,
        verifier=str(base),
        transformer_layer_config=text_config,
    )
    save_adapter(folder, adapter)
    return str(folder)


def served(*argv: str):
    """The engine config `vllm serve ARGV` makes, with vLLM's own parser."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", *argv, "--max-model-len", "256"])
    args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def flags(prefix, model, adapter):
    return served(
        model, f"--{prefix}-method", "bita", f"--{prefix}-model", adapter,
        f"--{prefix}-tokens", str(TOKENS), "--speculative-config", json.dumps({"tree": TREE}),
    )  # fmt: skip


def options(adapter):
    return {
        "method": "bita", "model": adapter, "num_speculative_tokens": TOKENS, "tree": TREE
    }  # fmt: skip


WAYS = {
    "speculative flags": lambda model, adapter: flags("speculative", model, adapter),
    "spec flags": lambda model, adapter: flags("spec", model, adapter),
    "JSON": lambda model, adapter: served(
        model, "--speculative-config", json.dumps(options(adapter))
    ),
    "dotted JSON": lambda model, adapter: served(
        model, "--spec-method", "bita", "--spec-model", adapter, "-sc.tree", TREE
    ),
    "Python": lambda model, adapter: EngineArgs(
        model, max_model_len=256, speculative_config=options(adapter)
    ).create_engine_config(),
    "adapter directory": lambda model, adapter: served(
        adapter, "--speculative-config", json.dumps({"tree": TREE})
    ),
    "adapter directory and flags": lambda model, adapter: served(
        adapter, "--speculative-method", "bita", "-sc.tree", TREE
    ),
}


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS.keys())
def test_every_way_to_ask_gives_the_same_settings(ask, model, adapter):
    config = ask(model, adapter)
    expected = get_settings(WAYS["Python"](model, adapter))
    settings = get_settings(config)
    assert replace(settings, ladder=None) == replace(expected, ladder=None)
    for column in ("parent", "rank", "mask_index"):
        same = getattr(settings.template, column) == getattr(expected.template, column)
        assert same.all()
    assert config.model_config.model == config.model_config.tokenizer == model
    assert config.parallel_config.worker_cls == "bita_vllm.runner.cpu.BitaCPUWorker"
    assert config.num_speculative_tokens == settings.num_speculative_tokens == 15


def test_adapter_directory_takes_a_row_budget_of_the_user(model, adapter):
    """The adapter's own number is only a default, so the flag is not 'mutually exclusive'."""
    settings = get_settings(served(adapter, "--speculative-tokens", "8"))
    assert settings.num_speculative_tokens <= 8


def test_contradicting_flag_and_json_are_refused(model, adapter):
    with pytest.raises(ValueError, match=r"--spec-tokens is 20.*is 30; give it once"):
        served(model, "-sc", json.dumps(options(adapter)), "--speculative-tokens", "20")


def test_plain_serve_does_not_ask_for_bita(model):
    config = served(model)
    assert config.speculative_config is None
    assert get_settings(config) is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"

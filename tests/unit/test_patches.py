"""The hook table holds for the installed vLLM and for 0.33, and leaves runs without bita alone.

`tests/data/vllm_0_33_signatures.json` comes from the source in vLLM's wheel, without running it:

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl 'vllm/*.py' -d /tmp/vllm_0_33
    python tests/unit/test_patches.py 0.33.0 /tmp/vllm_0_33/vllm
"""

import ast
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bita_vllm import hooks, patches, plugin, support
from bita_vllm.hooks.check import (
    check_installed,
    check_source,
    compare_signatures,
    locate,
    source_node,
    source_signatures,
)
from bita_vllm.step.settings import ConfigError

SIGNATURES = Path(__file__).parents[1] / "data" / "vllm_0_33_signatures.json"
HOOKS = patches.PATCHES + hooks.OVERRIDES + hooks.PLAIN_HOOKS
# abstract class of vLLM -> ours
SUBCLASSES = {
    "vllm.v1.outputs:AsyncModelRunnerOutput": "bita_vllm.runner.gpu:BlockOutput",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": "bita_vllm.runner.gpu_speculator:BlockSpeculator",
    "vllm.model_executor.layers.linear:LinearMethodBase": "bita_vllm.runner.delta_layers:MaskLoraMethod",
}


@pytest.fixture
def unpatched():
    """Stock vLLM for one test."""
    patches.undo()
    yield
    patches.undo()
    plugin.register()


@pytest.fixture
def patched():
    plugin.register()


def cli_actions() -> dict[str, str]:
    """Option -> everything argparse knows about it, but for its spellings."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return {
        option: f"{a.dest} {a.default!r} {a.nargs} {a.choices!r} {a.help!r}"
        for a in parser._actions
        for option in a.option_strings
    }


def test_installed_vllm_has_every_hook():
    assert check_source(Path(vllm.__file__).parent, patches.PATCHES + hooks.OVERRIDES) == []


def test_inspect_and_source_agree_on_signatures(unpatched):
    assert check_installed(HOOKS) == []


def test_vllm_0_33_has_every_hook():
    recorded = json.loads(SIGNATURES.read_text())
    assert recorded["vllm_version"] == "0.33.0"
    assert compare_signatures(recorded["signatures"], HOOKS) == []


@pytest.mark.parametrize("base", SUBCLASSES)
def test_our_classes_have_what_vllm_0_33_wants(base):
    """An abstract method that is missing shows when an object is made: on a GPU, in the first step."""
    module, _, name = SUBCLASSES[base].partition(":")
    ours = getattr(import_module(module), name)
    wanted = json.loads(SIGNATURES.read_text())["abstract_methods"][base]
    assert wanted
    for method in wanted:
        assert callable(getattr(ours, method))
        assert not getattr(getattr(ours, method), "__isabstractmethod__", False), method


def test_every_hook_says_why():
    assert all(hook.why and ":" in hook.target for hook in HOOKS)
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)


@pytest.mark.parametrize("hook", patches.PATCHES, ids=lambda hook: hook.target.rpartition(":")[2])
def test_undo_restores_the_original(hook, unpatched):
    owner, name = locate(hook.target)
    before = vars(owner)[name]
    plugin.register()
    assert vars(owner)[name] is not before
    patches.undo()
    assert vars(owner)[name] is before


def test_registering_twice_patches_once(unpatched):
    plugin.register()
    once = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is once


def test_cli_gains_three_aliases_and_nothing_else(unpatched):
    stock = cli_actions()
    plugin.register()
    ours = cli_actions()
    added = ours.keys() - stock.keys()
    assert added == set(patches.CLI_ALIASES.values())
    assert all(ours[alias] == ours[name] for name, alias in patches.CLI_ALIASES.items())
    changed = {option for option in stock if stock[option] != ours[option]}
    assert changed == {"--spec-method"}
    assert ours["--spec-method"].replace(", 'bita'", "") == stock["--spec-method"]


def test_config_of_a_plain_run_is_the_same(unpatched, tiny_model):
    def plain():
        args = EngineArgs(str(tiny_model("llama")), max_model_len=128, enforce_eager=True)
        config = args.create_engine_config()
        config.instance_id = ""
        return (
            str(config),
            repr(config.scheduler_config),
            repr(config.parallel_config),
            config.compute_hash(),
        )

    stock = plain()
    plugin.register()
    assert plain() == stock


def test_ngram_run_is_still_vllms_own(patched, tiny_model):
    options = {"method": "ngram", "num_speculative_tokens": 2}
    config = EngineArgs(
        str(tiny_model("llama")), max_model_len=128, speculative_config=options
    ).create_engine_config()
    assert type(config.speculative_config) is vllm.config.SpeculativeConfig
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        SamplingParams(min_p=0.5)._validate_spec_decode(config.speculative_config)


def break_hook(monkeypatch, state: str) -> patches.Hook:
    """Make one row of the table fail, as another vLLM would."""
    hook = patches.PATCHES[2]
    broken = patches.Hook(
        hook.target + ("_gone" if state == "missing" else ""), hook.why, "(self, other)", hook.patch
    )
    monkeypatch.setattr(patches, "PATCHES", (*patches.PATCHES[:2], broken, *patches.PATCHES[3:]))
    return broken


@pytest.mark.parametrize("state", ["missing", "changed"])
def test_broken_hook_is_logged_and_leaves_plain_vllm_alone(unpatched, monkeypatch, caplog, state):
    stock = EngineArgs.create_engine_config
    broken = break_hook(monkeypatch, state)
    monkeypatch.setattr(patches.logger, "propagate", True)
    monkeypatch.setattr(patches.logger.parent, "propagate", True)
    plugin.register()
    assert broken.target in caplog.text
    assert EngineArgs.create_engine_config is stock
    assert SamplingParams._validate_spec_decode.__module__ == "vllm.sampling_params"
    assert not hasattr(SamplingParams._validate_spec_decode, "__wrapped__")


def test_broken_hook_refuses_bita_with_the_versions_that_work(unpatched, monkeypatch, tiny_model):
    broken = break_hook(monkeypatch, "changed")
    plugin.register()
    args = EngineArgs(str(tiny_model("llama")), max_model_len=128, spec_method="bita")
    with pytest.raises(ConfigError, match=r"0\.32\.x and 0\.33\.x") as error:
        args.create_engine_config()
    assert broken.target in str(error.value)


def test_unsupported_version_refuses_bita_only(unpatched, monkeypatch, tiny_model):
    monkeypatch.setattr(support, "vllm_version", lambda: "0.31.2")
    plugin.register()
    model = str(tiny_model("llama"))
    assert EngineArgs(model, max_model_len=128).create_engine_config().speculative_config is None
    with pytest.raises(ConfigError, match=r"0\.32\.x and 0\.33\.x, but this is vLLM 0\.31\.2"):
        EngineArgs(model, max_model_len=128, spec_method="bita").create_engine_config()


def test_a_failure_of_ours_never_reaches_vllm(monkeypatch):
    def explode():
        raise RuntimeError("boom")

    monkeypatch.setattr(patches, "apply", explode)
    plugin.register()


def abstract_methods(package_dir: str, target: str) -> list[str]:
    """Of a class in a vLLM source tree: what a subclass must have."""
    return [
        method.name
        for method in source_node(Path(package_dir), target).body
        if isinstance(method, ast.FunctionDef)
        and any("abstractmethod" in ast.unparse(d) for d in method.decorator_list)
    ]


def write_signatures(version: str, package_dir: str) -> None:
    """Record the signatures of every hook in a vLLM source tree, and what its abstract classes want."""
    content = {
        "about": "Signatures of the hooks of bita_vllm/patches.py and bita_vllm/hooks/ in the source of vLLM's wheel; "
        "the docstring of tests/unit/test_patches.py says how to make it again.",
        "vllm_version": version,
        "signatures": source_signatures(package_dir, HOOKS),
        "abstract_methods": {base: abstract_methods(package_dir, base) for base in SUBCLASSES},
    }
    SIGNATURES.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write_signatures(*sys.argv[1:3])

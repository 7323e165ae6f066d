"""`bita doctor` says what is well and what is not, in a table and in JSON; every command ends with an exit code."""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform, PlatformEnum, UnspecifiedPlatform

from bita_vllm import cli, doctor, hooks, patches, support
from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import AdapterError, ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.step.settings import ConfigError
from bita_vllm.system.file_schemas import SchemaError
from bita_vllm.training.configs import GenerateConfig, TrainConfig
from bita_vllm.training.samples import DataError
from bita_vllm.training.trainer import TrainingError
from bita_vllm.tree import TemplateError
from bita_vllm.tree.ladder import LadderError
from bita_vllm.tree.step_cost import CostError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What `bita` sets in its own process must not reach other tests."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    shape = ModelShape.from_hf_config(json.loads((base / "config.json").read_text()))
    save_adapter(folder, random_adapter(shape, 3, 4, 0, verifier=str(base)))
    return folder


def report(capsys, *argv) -> tuple[int, dict]:
    code = cli.main(["doctor", "--json", *map(str, argv)])
    return code, json.loads(capsys.readouterr().out)


def failed(content: dict) -> list[str]:
    return [check["name"] for check in content["checks"] if not check["ok"]]


def test_sound_installation_passes(capsys, base, adapter):
    code, content = report(capsys, "--model", base, "--adapter", adapter)
    assert (code, content["ok"], failed(content)) == (0, True, [])
    names = [check["name"] for check in content["checks"]]
    named = [f"hook {hook.target}" for hook in patches.PATCHES + hooks.OVERRIDES]
    assert names == ["vLLM", "plugin", *named, "platform", "adapter"]
    assert "3 mask tokens, 4 prompt tokens" in content["checks"][-1]["detail"]


def test_rank_and_memory_of_deltas_are_said(capsys, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    deltas = {"model.layers.0.mlp.up_proj": (torch.ones(1024, 128), torch.ones(256, 1024))}
    MaskLoraWeights(1024, 1.0, deltas).save(folder / "mask_lora", "base", 3)
    code, content = report(capsys, "--adapter", folder)
    assert code == 0
    assert "deltas of rank 1024 (1.5 MiB)" in content["checks"][-1]["detail"]
    (folder / "mask_lora" / "adapter_config.json").unlink()
    code, content = report(capsys, "--adapter", folder)
    assert code == 1 and "no adapter_config.json" in content["checks"][-1]["detail"]


def test_table_names_every_hook(capsys, adapter):
    assert cli.main(["doctor", "--adapter", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert all(hook.target.rpartition(":")[2] in out for hook in patches.PATCHES)
    assert "can run bita" in out
    assert "FAIL" not in out


def test_adapter_for_another_model_fails(capsys, tiny_model, adapter):
    other = tiny_model("llama", num_hidden_layers=4)
    code, content = report(capsys, "--model", other, "--adapter", adapter)
    assert (code, failed(content)) == (1, ["adapter"])
    assert "num_layers is 3 in the adapter but 4 in the model" in content["checks"][-1]["detail"]


def test_adapter_that_is_not_there_fails(capsys):
    code, content = report(capsys, "--adapter", "/no/such/adapter")
    assert (code, failed(content)) == (1, ["adapter"])


def test_without_an_adapter_it_says_what_drafts(capsys, base, monkeypatch):
    code, content = report(capsys, "--model", base)
    assert (code, failed(content)) == (0, [])
    assert "copies of text already seen" in content["checks"][-1]["detail"]
    monkeypatch.setattr("bita_vllm.system.platform.current_platform", Cuda())
    assert report(capsys)[0] == 0
    code, content = report(capsys, "--model", base)
    assert (code, failed(content)) == (1, ["adapter"])
    assert "on a GPU a run needs one" in content["checks"][-1]["detail"]


def test_changed_and_missing_hooks_fail_with_both_signatures(capsys, monkeypatch):
    changed = patches.Hook("vllm.plugins:load_general_plugins", "why", "(group)")
    missing = patches.Hook("vllm.plugins:no_such_function", "why", "()")
    monkeypatch.setattr(hooks, "OVERRIDES", (changed, missing))
    code, content = report(capsys)
    details = {check["name"]: check["detail"] for check in content["checks"]}
    assert code == 1
    assert failed(content) == [f"hook {changed.target}", f"hook {missing.target}"]
    assert "has the signature (), expected (group)" in details[f"hook {changed.target}"]
    assert "is missing" in details[f"hook {missing.target}"]


def test_unsupported_version_fails_and_names_those_that_work(capsys, monkeypatch):
    monkeypatch.setattr(support, "vllm_version", lambda: "0.31.2")
    code, content = report(capsys)
    assert (code, failed(content)) == (1, ["vLLM"])
    assert "0.31.2" in content["checks"][0]["detail"]
    assert "0.32.x and 0.33.x" in content["checks"][0]["detail"]


def test_without_vllm_nothing_else_is_checked(monkeypatch):
    monkeypatch.setattr(support, "vllm_version", lambda: None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    checks = list(doctor.examine())
    assert [(check.name, check.ok) for check in checks] == [("vLLM", False)]
    assert "not installed" in checks[0].detail


def test_plugin_left_out_by_the_environment_fails(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, content = report(capsys)
    assert (code, failed(content)) == (1, ["plugin"])


class Cuda(Platform):
    """As vLLM's on a machine with an NVIDIA GPU; nothing is asked of a driver."""

    _enum, device_name = PlatformEnum.CUDA, "cuda"

    @classmethod
    def get_device_name(cls, device_id=0):
        return "NVIDIA H100 80GB HBM3"


class Rocm(Platform):
    _enum, device_name = PlatformEnum.ROCM, "rocm"


@pytest.mark.parametrize(
    ("platform", "v2_runner", "ok", "said"),
    [
        (CpuPlatform, None, True, r"CPU \(.+\), vLLM's V1 model runner"),
        (CpuPlatform, "1", False, "VLLM_USE_V2_MODEL_RUNNER=1 is set, but on CPU"),
        (Cuda, None, True, r"CUDA \(NVIDIA H100 80GB HBM3\), vLLM's V2 model runner"),
        (Cuda, "0", False, "VLLM_USE_V2_MODEL_RUNNER=0 is set, but on a GPU"),
        (Rocm, None, False, "CUDA and CPU platforms, but this is 'rocm'"),
        (UnspecifiedPlatform, None, False, "CUDA and CPU platforms, but this is an unknown one"),
    ],
    ids=["CPU", "CPU, V2 asked for", "CUDA", "CUDA, V1 asked for", "ROCm", "unknown"],
)
def test_platform(capsys, monkeypatch, platform, v2_runner, ok, said):
    monkeypatch.setattr("bita_vllm.system.platform.current_platform", platform())
    if v2_runner is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2_runner)
    code, content = report(capsys)
    (platform_check,) = (check for check in content["checks"] if check["name"] == "platform")
    assert re.search(said, platform_check["detail"])
    assert (code, failed(content)) == ((0, []) if ok else (1, ["platform"]))


@pytest.mark.parametrize("argv", [[], ["no-such-command"]], ids=["nothing", "unknown"])
def test_wrong_command_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: bita" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_a_command_in_a_sentence(capsys, monkeypatch, tmp_path, number):
    def run(args):
        try:
            os.kill(os.getpid(), number)
        finally:
            (tmp_path / "tidied").touch()
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(doctor, "run", run)
    # What starts the tests may have had SIGINT ignored, as a shell does for jobs in the background.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["doctor"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, interrupt)
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"bita: Ended by {number.name}") and "\n" not in error
    assert (tmp_path / "tidied").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_the_system_refuses_is_a_sentence(capsys, monkeypatch):
    def run(args):
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err.strip()
    assert "No space left on device" in error and "/somewhere" in error and "\n" not in error


@pytest.mark.parametrize(
    "error",
    [
        AdapterError,
        ConfigError,
        CostError,
        DataError,
        LadderError,
        SchemaError,
        TemplateError,
        TrainingError,
    ],
)
def test_what_a_user_can_put_right_is_a_sentence(capsys, monkeypatch, error):
    def run(args):
        raise error("--steps is 0, but must be at least 1.")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "bita: --steps is 0, but must be at least 1.\n"


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        (["train", "model", "--data", "a.jsonl", "--out", "adapter"], TrainConfig()),
        (["data", "model", "--out", "a.jsonl"], GenerateConfig()),
    ],
    ids=["train", "data"],
)
def test_defaults_are_the_settings_own(argv, config, capsys):
    args = vars(cli.make_parser().parse_args(argv))
    assert {name: args[name] for name in asdict(config)} == asdict(config)
    with pytest.raises(SystemExit):
        cli.main([argv[0], "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {config.batch_size})" in shown

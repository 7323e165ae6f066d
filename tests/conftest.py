"""Models for the tests, made once a session: `embedded_model` and `tiny_model(architecture)`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bita_vllm.embedded import embedded_model_dir


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runner",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: end-to-end tests run vLLM's V2 runner and our Triton kernels, interpreted on the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    # What vLLM 0.32 saves of a compiled model on a CPU it cannot load; with Inductor's own cache, plain vLLM's second
    # start compiles nothing either.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if config.getoption("runner") == "gpu":
        from testbed import v2_on_cpu

        v2_on_cpu.install()


@pytest.fixture(autouse=True)
def same_environment_after() -> Iterator[None]:
    """What a test sets (`bita` itself turns vLLM's log down) does not reach the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct."""
    return embedded_model_dir()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory: `tiny_model("llama", dtype="float32", **config_overrides)` returns a directory."""
    from testbed.tiny_models import make_tiny_model  # imports torch: only for tests that need it

    made: dict[str, Path] = {}

    def factory(architecture: str, dtype: str = "float32", **overrides: Any) -> Path:
        key = f"{architecture}-{dtype}-{sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[key] = make_tiny_model(folder, architecture, dtype, **overrides)
        return made[key]

    return factory

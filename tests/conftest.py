"""Models for the tests, made once a session: `embedded_model` and `tiny_model(architecture)`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bita_vllm.embedded import embedded_model_dir

# Files that take longest, longest first: of two workers none starts a long one when the other is done. Of each group.
LONGEST = {
    "cpu": [
        *("lossless_embedded", "faults", "unchanged_without_bita", "soak", "server", "server_load"),
        *("hostile_files", "matrix", "cpu_kernels", "compiled_deltas", "sampling_distribution"),
        *("bad_input", "accepted_length", "suite_engines", "train_command", "trainer", "plain_steps"),
        *("data_and_eval", "bf16", "aot", "tree_attention"),
    ],
    "gpu": [
        *("shipped_sets", "vllm_0_33", "mixed_steps", "weight_reload", "gpu_suite", "structured_output"),
        *("request_features", "lossless_architectures", "gpu_runner", "tune", "tensor_parallel"),
        *("token_budget", "thinking_budget"),
    ],
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runner",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: end-to-end tests run vLLM's V2 runner and our Triton kernels, interpreted on the CPU",
    )
    parser.addoption(
        "--matrix", action="store_true", help="test_matrix.py runs every architecture, not some"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What vLLM 0.32 saves of a compiled model on a CPU it cannot load; with Inductor's own cache, plain vLLM's second
    # start compiles nothing either.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if config.getoption("runner") == "gpu":
        from testbed import v2_on_cpu

        v2_on_cpu.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    longest = LONGEST[config.getoption("runner")]
    place = {f"test_{name}": i for i, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def same_environment_after() -> Iterator[None]:
    """What a test sets (`bita` itself turns vLLM's log down) does not reach the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of torch, for what shares its work out: `make test` gives each process one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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

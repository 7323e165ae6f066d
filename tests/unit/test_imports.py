"""The floor plan: imports go one way, and nothing that is installed needs tests or benchmarks."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def imported_names(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file, and the first part of every name that it imports."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module.partition(".")[0]


def test_imports_go_one_way():
    """The contracts in pyproject.toml, as `make quality` checks them."""
    command = [sys.executable, "-c", LINT, "--no-cache", "--config"]
    done = subprocess.run(
        [*command, ROOT / "pyproject.toml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("product", ["bita_vllm", "kernels"])
def test_nothing_installed_imports_tests_or_benchmarks(product):
    """Both are on the path by folder, so each of their files has a name of its own there."""
    outside = {"tests", "benchmarks"}
    for folder in ("tests", "benchmarks"):
        outside |= {path.stem for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py")}
    outside -= {"README", "results", "data", "kernels", "conftest"}
    assert [(path, name) for path, name in imported_names(ROOT / product) if name in outside] == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_script_changes_the_path(folder):
    changes = [path for path in (ROOT / folder).rglob("*.py") if "sys.path." in path.read_text()]
    assert changes == [Path(__file__)] * (folder == "tests")


def test_the_top_of_the_package_is_small():
    modules = [path for path in (ROOT / "bita_vllm").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 10

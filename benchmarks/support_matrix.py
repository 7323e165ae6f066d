"""Write docs/support.md from the support matrix (testbed/architectures.py, testbed/features.py)."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from testbed.architectures import ARCHITECTURES, WORKS
from testbed.features import FEATURES, Feature

PAGE = Path(__file__).parent.parent / "docs" / "support.md"

HEAD = """# What is served
This page is made by `python benchmarks/support_matrix.py` from the data in `benchmarks/testbed/architectures.py` and
`features.py`; a test holds it to them.

## Models
`make matrix` runs every cell (`tests/e2e/test_matrix.py`) with a tiny random model of the architecture in fp32: greedy
and seeded requests, drafts from an oracle and from a random adapter with low-rank deltas, tokens as plain vLLM's. CI
runs a part of them. "Training" means that the logits of mask rows in `bita train` equal the engine's, within 1e-3. The
GPU runner is vLLM's V2 runner with our Triton kernels, interpreted on a CPU. A model that is not here may well work:
what cannot be served is refused in a sentence.

"""

FEATURES_HEAD = """
## Features
Each row names the test that shows what works, and that what does not is refused by name, before any process starts or
before weights are read.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    PAGE.write_text(render())


def render() -> str:
    """Return the page."""
    return HEAD + "\n".join(model_rows()) + "\n" + FEATURES_HEAD + "\n".join(feature_rows()) + "\n"


def model_rows() -> Iterator[str]:
    yield "| model type | such as | what it is here for | in vLLM | CPU | GPU runner | training |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in sorted(ARCHITECTURES.items()):
        cells = (row.models, row.features, row.backend, WORKS, row.gpu_runner, row.training)
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    yield f"{len(ARCHITECTURES)} architectures."


def feature_rows() -> Iterator[str]:
    yield "| feature | CPU | GPU runner | test |"
    yield "|---|---|---|---|"
    for feature in FEATURES:
        yield f"| {feature.name} | {' | '.join(map(cell, (feature.cpu, feature.gpu)))} | {link(feature)} |"


def cell(reason: str) -> str:
    return f"refused: {reason}" if reason else WORKS


def link(feature: Feature) -> str:
    file, _, function = feature.test.partition("::")
    return f"[{function}](../tests/{file})"


if __name__ == "__main__":
    main()

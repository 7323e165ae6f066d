"""The cases that compute-sanitizer watches on a GPU (benchmarks/memcheck.py), interpreted."""

import memcheck
import pytest
import torch
from bita_kernels.aot import KERNEL_FILES

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "kind", ["beginnings", "walks", "paths", "rankings", "blocks", "copies", "moves", "deltas"]
)
def test_every_kernel_equals_its_twin(kind):
    for name, error_of in getattr(memcheck, kind)(CPU):
        assert error_of() < 1e-5, name


def test_every_kernel_file_has_cases():
    cases = {case[0].split(",")[0] for kind in memcheck.KINDS for case in kind(CPU)}
    assert cases == set(KERNEL_FILES)


def test_tree_attention_as_the_kernel_benchmark_calls_it():
    """Head size 64, R = 16, with an engine's max_model_len: splits in turn and side by side."""
    cases = [case for case in memcheck.attention(CPU) if "D 64" in case[0] and "R = 16" in case[0]]
    assert len(cases) == 2
    for name, error_of in cases:
        assert error_of() < 1e-5, name

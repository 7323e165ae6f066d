"""Catches reads of device tensors by the host, in our own code of a V2 step.

On a GPU each would stop the host until the device has caught up; on a CPU they go unnoticed. A read
counts as ours if the innermost frame outside torch is ours: vLLM's and Triton's own are theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "bita_vllm"), str(ROOT / "kernels"), "bita_kernels")
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__")
METHODS += ("__float__", "__index__", "__array__")
# Tensors that live on the host by design: file and function.
HOST_TENSORS = {
    ("gpu_sampling.py", "of"),
    ("gpu_metadata.py", "of"),
}  # input_batch.seq_lens_cpu_upper_bound
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _reader() -> str | None:
    """'file:line function' of ours, or None."""
    frame = sys._getframe(2)
    skipped = (__file__, str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    if frame is None:
        return None
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    ours = any(part in file for part in OURS)
    if not ours or (Path(file).name, function) in HOST_TENSORS:
        return None
    return f"{Path(file).name}:{frame.f_lineno} {function}"


class _Dispatch(TorchDispatchMode):
    """What reaches no method of Tensor: `x[mask]` with a bool mask, int(x) in C."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (func in READS or masks) and (reader := _reader()):
            self._found.append(f"{reader}: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def device_reads() -> Iterator[list[str]]:
    """Reads of ours, while the V2 runner's steps run inside."""
    from bita_vllm.runner.gpu import BitaGPUModelRunner, BitaModelState, BlockSpeculator

    found: list[str] = []

    def watched(original: Any, name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            if reader := _reader():
                found.append(f"{reader}: Tensor.{name}")
            return original(*args, **kwargs)

        return method

    def dispatching(original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            with _Dispatch(found):
                return original(*args, **kwargs)

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), name))
        for owner, name in (
            (BitaGPUModelRunner, "sample"),
            (BitaModelState, "prepare_attn"),
            (BlockSpeculator, "propose"),
        ):
            patch.setattr(owner, name, dispatching(getattr(owner, name)))
        yield found

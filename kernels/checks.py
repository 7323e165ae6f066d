"""Checks at the boundary: every launcher refuses what does not fit before it launches anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton

INT32 = (torch.int32,)
INTEGERS = (torch.int32, torch.int64)
FLAGS = (torch.bool, torch.uint8)
TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
# Kinds of arguments that a launcher remembers: at 4 kB each, as prefill makes steps of any number of rows.
MAX_KINDS = 4096
QUANTISED_TYPES = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}


def kind_of(tensors: Iterable[torch.Tensor]) -> tuple[object, ...]:
    """What the checks look at: a launcher checks arguments of one kind once, as checks take longer than launches."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def remember(kind: object, checked: set[object]) -> None:
    """Add a kind that has been checked; when there are too many, all others are forgotten."""
    if len(checked) >= MAX_KINDS:
        checked.clear()
    checked.add(kind)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    # None: any size
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    contiguous: bool = True,
    packed: bool = True,
) -> None:
    """Raise ValueError with argument, what was given and what was expected.

    `contiguous=False` still wants the last dimension packed, `packed=False` takes any strides.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}].")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {wanted}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} as for the others.")
    if contiguous and packed and not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor."
        )
    if packed and tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}, expected 1 in the last dimension."
        )


def check_device(kernel: object, device: torch.device) -> None:
    """Raise ValueError where the kernel cannot run: on CPU tensors, unless it was made for the interpreter."""
    if device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"The tensors are on {device}, expected a CUDA device; on CPU tensors Triton kernels run only "
            "with TRITON_INTERPRET=1 set before they are imported, else use the naive twin."
        )

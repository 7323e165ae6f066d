"""Shipped configurations: what the product launches, as data for ahead-of-time compilation (aot.py).

Each kernel file lists its own in a function `shipped() -> list[Shipped]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Compute capabilities: A100, L4 and RTX 4090, H100 and H200, B200, RTX 5090.
TARGETS = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration.

    Attributes:
        name: what the table calls it, e.g. "D128 G4 bf16".
        kernel: the `@triton.jit` function.
        signature: argument -> Triton type ("*bf16", "i32", "fp32" ...), for every argument that is not
            in `constexprs`.
        constexprs: argument -> value; also arguments that a launch specialises (a stride of 1, None).
        divisible: integer arguments that are multiples of 16 at every launch (Triton specialises them
            too). Pointers always count as 16-byte aligned: torch allocates them so.
        tensor_cores: the kernel must use them; the test looks for their instructions.
        targets: compute capabilities it is compiled for (fp8e4nv, for one, does not exist on sm_80).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    tensor_cores: bool = False
    targets: tuple[int, ...] = TARGETS

"""Kernel tests run in Triton's interpreter: set before any kernel is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from testbed.quick_interpreter import quicken
from triton.runtime import interpreter

quicken()

_create_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot_of_bf16(self, a, b, d, *options):
    """The interpreter keeps bf16 as its bits, and its own `dot` would multiply those."""

    def decoded(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(wide.view(np.float32), tl.float32)

    return _create_dot(self, decoded(a), decoded(b), d, *options)


interpreter.InterpreterBuilder.create_dot = _create_dot_of_bf16

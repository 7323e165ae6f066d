"""Triton's interpreter without the book-keeping that most of its time went to: the same operations, the same checks."""

from __future__ import annotations

import inspect
from functools import lru_cache
from types import SimpleNamespace
from typing import Any


def quicken() -> None:
    """Let the interpreter look up what it would work out again at every launch or operation.

    For the whole process. Imports Triton, so TRITON_INTERPRET must be set.
    """
    import triton.runtime.interpreter as interpreter

    _patch_the_language_once(interpreter)
    _remember_numpy_types(interpreter)
    _take_arguments_as_they_are(interpreter)
    _remember_shapes()
    _remember_promotions()


def _patch_the_language_once(interpreter: Any) -> None:
    """Not at every launch and every call of a device function; builtins get their semantic without a detour."""
    import triton.language as tl

    semantic = interpreter.interpreter_semantic

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, called)

    interpreter._patch_attr = patch_attr
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def _remember_numpy_types(interpreter: Any) -> None:
    """It makes the table of all types at every load."""
    numpy_type, known = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name  # pointers have no hash
        if name not in known:
            known[name] = numpy_type(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered


def _take_arguments_as_they_are(interpreter: Any) -> None:
    """They are on the host: no copies of them, and none back of whole KV caches."""
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda self, *args: None
    cached = {name: lru_cache(getattr(inspect, name)) for name in ("getfullargspec", "signature")}
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), **cached})


def _remember_shapes() -> None:
    """Every result makes a type of its own, with a tuple, a name and checks, and a tensor with another tuple."""
    import triton.language as tl
    from triton.language import semantic

    core = tl.core
    # the type's shape, its numel, its shape's name; the tensor's shape and numel
    known: dict[tuple[int, ...], tuple[Any, int, str, Any, Any]] = {}
    scalar = core.tuple([]), core.constexpr(1)
    make_type, broadcast = (
        core.block_type.__init__,
        semantic.TritonSemantic.broadcast_impl_value,
    )

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, core.tuple) else shape
        key = tuple([n.value if isinstance(n, core.constexpr) else n for n in values])
        if key not in known:
            make_type(self, element_ty, shape)  # refuses what is no shape
            of_tensor = core.tuple([core.constexpr(n) for n in key]), core.constexpr(self.numel)
            known[key] = self.shape, self.numel, str(self.shape), *of_tensor
        self.element_ty = element_ty
        self.shape, self.numel, name, *self.of_tensor = known[key]
        self.name = f"<{name}, {element_ty.name}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else scalar

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core.block_type.__init__ = init_type
    core.tensor.__init__ = init_tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast_others


def _remember_promotions() -> None:
    """Which type two others are computed in, and which names are those of integers."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    dtype = tl.dtype
    integers, equal = frozenset(dtype.SINT_TYPES + dtype.UINT_TYPES), dtype.__eq__
    dtype.is_int = lambda self: self.name in integers
    dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    TritonSemantic.computation_type_impl = lru_cache(TritonSemantic.computation_type_impl)

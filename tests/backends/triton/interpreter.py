"""Makes Triton's interpreter round as a GPU does, so that what it computes can be held to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from gencore.noise import fma


@functools.cache
def exact_arithmetic() -> None:
    """Corrects the interpreter for this process, where it is wrong.

    The fma of Triton 3.6 rounds twice, and its loops cannot count with NumPy 2.4. The conversions of all versions up to
    3.9 cut off what bfloat16 cannot hold, instead of rounding to nearest, and lose subnormal numbers. Their products of
    matrices take the bits of bfloat16 for integers. A quarter of their time goes into two things that change nothing.
    """
    builder = interpreter.InterpreterBuilder
    if not _is_fused(builder().create_fma):
        builder.create_fma = _create_fma(builder.create_fma)
    builder.cast_impl = _cast_impl(builder.cast_impl)
    builder.create_dot = _create_dot(builder.create_dot)
    interpreter._patch_lang_tensor = _patch_lang_tensor(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _patch_lang(interpreter._patch_lang)
    interpreter._get_np_dtype = _get_np_dtype(interpreter._get_np_dtype)


def _is_fused(create_fma: Callable[..., Any]) -> bool:
    x, y = (interpreter.TensorHandle(np.array([v], np.float32), tl.float32) for v in (1 + 2.0**-12, -1 - 2.0**-11))
    return bool(create_fma(x, x, y).data[0] == 2.0**-24)


def _create_fma(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        rounded_twice = before(self, x, y, z)
        if x.data.dtype != np.float32:
            return rounded_twice
        with np.errstate(all="ignore"):
            exact = fma(x.data, y.data, z.data)
        # gencore.noise.fma is for finite values.
        data = np.where(np.isfinite(rounded_twice.data), exact, rounded_twice.data)
        return interpreter.TensorHandle(data, tl.float32)

    return create_fma


def _cast_impl(before: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            bits = source.data.view(np.uint32)
            rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
            data = np.where(np.isnan(source.data), 0x7FFF, rounded).astype(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        # Overflow to infinity is what a GPU does too, in silence.
        with np.errstate(over="ignore"):
            return before(self, source, target)

    return cast_impl


def _create_dot(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        with np.errstate(all="ignore"):
            return before(self, a, b, d, *settings)

    return create_dot


def _patch_lang_tensor(before: Callable[..., None]) -> Callable[..., None]:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


def _patch_lang(before: Callable[..., Any]) -> Callable[..., Any]:
    """Every call of a function from a kernel replaces all of triton.language again; once a launch is enough."""
    replaced: set[str] = set()

    def patch_lang(function: Any) -> Any:
        modules = {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}
        if modules <= replaced:
            return interpreter._LangPatchScope()
        scope = before(function)
        replaced.update(modules)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            replaced.difference_update(modules)

        # Only a launch does so; what its functions replaced stays.
        scope.restore = restore_and_forget
        return scope

    return patch_lang


def _get_np_dtype(before: Callable[..., Any]) -> Callable[..., Any]:
    """It makes a table of all types each time."""
    known: dict[str, np.dtype] = {}

    def get_np_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(scalar, tl.pointer_type):
            return before(dtype)
        if scalar.name not in known:
            known[scalar.name] = before(scalar)
        return known[scalar.name]

    return get_np_dtype

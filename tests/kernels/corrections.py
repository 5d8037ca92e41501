"""Arithmetic of Triton's interpreter (3.6 to 3.9), corrected to that of the hardware.

The interpreter keeps bfloat16 as the 16 bits of an integer, and adds, multiplies and compares those
integers without a word; what it rounds to bfloat16 it cuts off. Here an operation on bfloat16
widens to float32, computes, and rounds to nearest, ties to even, as CUDA does. Products of float32
matrices lose the 13 bits that tensor cores do not read, unless the kernel asks for
``input_precision="ieee"``; the interpreter alone would compute them in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpreterBuilder,
    ReduceOps,
    ReduceScanOpInterface,
    ScanOps,
    TensorHandle,
    _ir,
)

Array = np.ndarray[Any, Any]
Operation = Callable[..., Array]

_QUIET_NAN = np.uint16(0x7FC0)
_READ_BY_TENSOR_CORES = np.uint32(0xFFFFE000)


def widen(bits: Array) -> Array:
    """float32 values of bfloat16 bit patterns, which are uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Array) -> Array:
    """Bit patterns of the nearest bfloat16 values, ties to even."""
    floats = np.array(values, dtype=np.float32, order="C")
    bits = floats.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(floats), _QUIET_NAN, rounded)


def install() -> None:
    """Correct the interpreter for the rest of the process; a second time changes nothing."""
    interpreter.interpreter_builder.__class__ = CorrectedBuilder
    interpreter.ReduceOps = CorrectedReduction
    interpreter.ScanOps = CorrectedScan
    interpreter._patch_lang_tensor = _patch_tensor


class CorrectedBuilder(InterpreterBuilder):  # type: ignore[misc]
    """Operations on bfloat16 by way of float32, and products as tensor cores read them."""

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value])), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        target = dst_type.scalar
        if not _is_bf16(src) and target != tl.bfloat16:
            return super().cast_impl(src, dst_type)
        values = _values(src)
        data = narrow(values) if target == tl.bfloat16 else values.astype(_numpy(target))
        return TensorHandle(data, target)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
        if rounding == _ir.ROUNDING_MODE.RTNE and {src.dtype.scalar, dst_type.scalar} <= _FLOATS:
            return self.cast_impl(src, dst_type)
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            raise NotImplementedError(f"{src.dtype} to {dst_type} rounded by {rounding}")
        return super().create_fp_to_fp(src, dst_type, rounding)

    def unary_op(self, arg: TensorHandle, op: Operation) -> TensorHandle:
        return _by_float32(super().unary_op, op, arg)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Operation) -> TensorHandle:
        return _by_float32(super().binary_op, op, lhs, rhs)

    def ternary_op(self, *arguments: Any) -> TensorHandle:
        *operands, op = arguments
        return _by_float32(super().ternary_op, op, *operands)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        # in float64, where products are exact; Triton 3.6 rounds them before it adds
        values = [_values(operand).astype(np.float64) for operand in (x, y, z)]
        total = values[0] * values[1] + values[2]
        return self.cast_impl(TensorHandle(total, tl.float64), z.dtype)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: int
    ) -> TensorHandle:
        a, b = _widened(a), _widened(b)
        if precision == _ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (TensorHandle(_cut(t.data), t.dtype) for t in (a, b))
        return super().create_dot(a, b, d, precision, imprecise)


class _Widening(ReduceScanOpInterface):  # type: ignore[misc]
    """Reduces bfloat16 in float32, and rounds the outcome."""

    def apply(self, input: Any) -> Any:  # noqa: A002 - its name in the interpreter
        if not isinstance(input, tuple) or not any(_is_bf16(arg.handle) for arg in input):
            return super().apply(input)
        wide = tuple(_as_tensor(_widened(arg.handle), arg.type) for arg in input)
        return tuple(
            _as_tensor(TensorHandle(narrow(out.handle.data), tl.bfloat16), out.type)
            if _is_bf16(arg.handle)
            else out
            for arg, out in zip(input, super().apply(wide), strict=True)
        )


class CorrectedReduction(_Widening, ReduceOps):  # type: ignore[misc]
    """``tl.reduce`` and what is made of it."""


class CorrectedScan(_Widening, ScanOps):  # type: ignore[misc]
    """``tl.associative_scan`` and what is made of it."""


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> Array:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _by_float32(compute: Callable[..., TensorHandle], op: Operation, *operands: Any) -> Any:
    """What an operation gives; a number that it makes of bfloat16 is rounded to bfloat16.

    A comparison keeps its booleans, which Triton gives the type of the operands at first.
    """
    outcome = compute(*map(_widened, operands), op)
    if not _is_bf16(operands[-1]):
        return outcome
    bits = outcome.data if outcome.data.dtype == np.bool_ else narrow(outcome.data)
    return TensorHandle(bits, tl.bfloat16)


def _as_tensor(handle: TensorHandle, like: Any) -> tl.tensor:
    """A tensor of the shape of a type."""
    scalar = handle.dtype.scalar
    return tl.tensor(handle, like.with_element_ty(scalar) if like.is_block() else scalar)


def _cut(values: Array) -> Array:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & _READ_BY_TENSOR_CORES).view(np.float32)


_FLOATS = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
_numpy = interpreter._get_np_dtype
_original_patch = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Let tensors of one element bound loops, which Triton 3.6 cannot with numpy 2.4."""
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

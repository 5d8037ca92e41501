"""What the ops share on the host: operands checked and laid out, arguments of kernels, devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels.configs import Config

__all__ = ["DTYPES", "Operands", "demand", "register", "straight", "strides"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LOG2_E = math.log2(math.e)
_LEAST_BLOCK = 16  # of a matrix product


@dataclass(frozen=True, slots=True)
class Operands:
    """What attention is computed of, as in ``reference.attention``.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv]; the same object as ``key`` where keys are the values.
        span: int32 [B, T, 2].
        scale: Factor on the scores, greater than 0.
        softcap: Bound of the scores, or None.
        slopes: [H], or None.
        query_rope: [B, H, T, Dr], or None.
        key_rope: [B, 1, K, Dr], or None.
        key_scale: [B, groups, K], factors on the scores of each group of heads, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    span: Tensor
    scale: float
    softcap: float | None
    slopes: Tensor | None = None
    query_rope: Tensor | None = None
    key_rope: Tensor | None = None
    key_scale: Tensor | None = None

    def checked(self) -> Self:
        """Itself, if shapes and dtypes fit; a kernel would read beyond those that do not.

        Raises:
            UsageError: Naming the operand, with what was expected.
        """
        batch, heads, queries, dim = self.query.shape
        kv_heads, keys = self.key.shape[1:3]
        dtype = self.query.dtype
        _expect(self.key, "key", (batch, kv_heads, keys, dim), dtype)
        _expect(self.value, "value", (batch, kv_heads, keys, self.value.shape[-1]), dtype)
        _expect(self.span, "span", (batch, queries, 2), torch.int32)
        _share(heads, kv_heads, "key heads")
        if (self.query_rope is None) != (self.key_rope is None):
            raise UsageError("query_rope and key_rope come together")
        if self.query_rope is not None and self.key_rope is not None:
            rope_dim = self.query_rope.shape[-1]
            _expect(self.query_rope, "query_rope", (batch, heads, queries, rope_dim), dtype)
            _expect(self.key_rope, "key_rope", (batch, 1, keys, rope_dim), dtype)
        if self.key_scale is not None:
            groups = self.key_scale.shape[1]
            _expect(self.key_scale, "key_scale", (batch, groups, keys), self.key_scale.dtype)
            _share(heads, groups, "key scales")
        if self.slopes is not None:
            _expect(self.slopes, "slopes", (heads,), self.slopes.dtype)
            if self.slopes.requires_grad:
                raise UsageError("slopes have no gradient here", hint="detach them")
        if self.scale <= 0 or (self.softcap is not None and self.softcap <= 0):
            raise UsageError(
                f"scale {self.scale} and softcap {self.softcap} must be greater than 0"
            )
        return self

    def straight(self) -> Self:
        """The same, the last axis of each tensor contiguous, as kernels take it."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        laid_out: dict[str, Any] = {
            name: straight(one) for name, one in tensors.items() if isinstance(one, Tensor)
        }
        if self.value is self.key:
            laid_out["value"] = laid_out["key"]
        return replace(self, **laid_out)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """Widths by which blocks are chosen; that of a rotary part that is not there is 0."""
        return {
            "dim": self.query.shape[-1],
            "value_dim": self.value.shape[-1],
            "rope_dim": 0 if self.query_rope is None else self.query_rope.shape[-1],
        }

    def arguments(self, config: Config) -> dict[str, Any]:
        """Arguments that all kernels take, by name."""
        inner, outer = self.scale * _LOG2_E, 0.0
        if self.softcap is not None:
            inner, outer = -2 * inner / self.softcap, self.softcap * _LOG2_E
        dim, value_dim, rope_dim = self.sizes.values()
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "query_rope": self.query_rope,
            "key_rope": self.key_rope,
            "span": self.span,
            "slopes": self.slopes,
            **strides("query", "bht", self.query),
            **strides("key", "bhn", self.key),
            **strides("value", "bhn", self.value),
            **strides("query_rope", "bht", self.query_rope),
            **strides("key_rope", "b_n", self.key_rope),
            **strides("span", "bt", self.span),
            "group": self.group,
            "queries": self.query.shape[2],
            "keys": self.key.shape[2],
            "inner": inner,
            "outer": outer,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "ROPE_DIM": rope_dim,
            "BLOCK_D": _block(dim),
            "BLOCK_V": _block(value_dim),
            "BLOCK_R": _block(rope_dim),
            "CAPPED": self.softcap is not None,
            "BIASED": self.slopes is not None,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,  # the default of Triton changes with 3.10
        }


def _block(width: int) -> int:
    """The power of two that a block of this width has."""
    return max(_LEAST_BLOCK, 1 << (width - 1).bit_length())


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Arguments ``<name>_<axis>`` for each axis but "_"; 0 without a tensor."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": steps[at] for at, axis in enumerate(axes) if axis != "_"}


def straight(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _share(heads: int, shared: int, what: str) -> None:
    if heads % shared:
        raise UsageError(f"{heads} query heads cannot share {shared} {what} evenly")


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise UsageError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, "
            f"where {dtype} {list(shape)} was expected"
        )


def demand(reason: str | None) -> None:
    """Refuse to run a kernel that cannot, if there is a reason.

    Raises:
        UsageError: With the reason.
    """
    if reason is not None:
        raise UsageError(
            f"this kernel cannot run: {reason}",
            hint="use another attention implementation, such as sdpa",
        )


def register(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make an op of ``torch.ops.kvpatch``.

    Args:
        name: Of the op.
        schema: What it takes and gives.
        compute: The op, which Triton launches on the device of the first operand: a model may be on
            several.
        fake: The same for tensors without data.
    """

    @wraps(compute)
    def on_device(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return compute(first, *others)

    name = f"kvpatch::{name}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"), on_device)
    torch.library.register_fake(name, fake)

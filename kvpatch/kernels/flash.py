"""Fused attention with gradients, for training and for prompts.

Keys and values are never repeated for the heads that share them, nor are their gradients; what a
query sees is a span; scores are not kept. For MLA the rotary part of queries and keys stays apart,
so the one rotary key of all heads is not expanded, and values may be narrower than keys.

The same inputs give the same gradients to the bit: no sum depends on the order of programs.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels.configs import architecture, find
from kvpatch.kernels.device import obstacle
from kvpatch.kernels.flash_launch import forward, grad_of_keys, grad_of_queries, parts_of_group
from kvpatch.kernels.launch import DTYPES, Operands, demand, register, straight

__all__ = ["attention", "unsupported"]

_OPS = ("flash_forward", "flash_backward_queries", "flash_backward_keys")
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor span, float scale, float? softcap, "
    "Tensor? slopes, Tensor? query_rope, Tensor? key_rope"
)


def unsupported(
    device: torch.device, dtype: torch.dtype, dim: int, value_dim: int, rope_dim: int = 0
) -> str | None:
    """Why the op cannot compute something, or None if it can.

    Args:
        device: Of the operands.
        dtype: Of them.
        dim: Width of queries and keys, without a rotary part that is apart.
        value_dim: Width of values.
        rope_dim: Width of the rotary part that is apart.
    """
    reason = obstacle(device)
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"its dtype is {dtype}, and kernels compute in float32, float16 and bfloat16"
    arch = architecture(device)
    sizes = {"dim": dim, "value_dim": value_dim, "rope_dim": rope_dim}
    if any(find(op, arch, dtype, **sizes) is None for op in _OPS):
        return f"no blocks of architecture {arch} serve {sizes} in {dtype}"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
) -> Tensor:
    """Attention of each query to the keys of its span; see ``reference.attention``.

    It has gradients with respect to queries, keys, values and rotary parts, but no second ones.
    Tensors may have any strides; one whose last axis is not contiguous is copied. Under autocast
    they are cast to its dtype.

    Args:
        query: [B, H, T, D] in float32, float16 or bfloat16, as all that follow but ``span``.
        key: [B, Hkv, K, D], where H is a multiple of Hkv.
        value: [B, Hkv, K, Dv].
        span: int32 [B, T, 2]; neither end may decrease from one query to the next. Keys that no
            span has must be finite.
        scale: Factor on the scores, greater than 0.
        softcap: Scores are bounded to plus and minus this by a tanh; not at all if None.
        slopes: [H], of ALiBi; no gradient.
        query_rope: [B, H, T, Dr], whose products with ``key_rope`` are added to the others.
        key_rope: [B, 1, K, Dr], one for all heads.

    Returns:
        [B, T, H, Dv], contiguous; 0 where a span is empty.

    Raises:
        UsageError: Shapes or dtypes do not fit, or ``unsupported``.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if query_rope is not None and key_rope is not None:
            query_rope, key_rope = query_rope.to(dtype), key_rope.to(dtype)
    Operands(
        query, key, value, span, scale, softcap, slopes, query_rope=query_rope, key_rope=key_rope
    ).checked()
    slopes = None if slopes is None else slopes.float()
    output: Tensor = torch.ops.kvpatch.flash_forward(
        query, key, value, span, scale, softcap, slopes, query_rope, key_rope
    )[0]
    return output


def _operands(*inputs: Any) -> Operands:
    """The operands of an op as kernels take them, in the order of its schema."""
    operands = Operands(*inputs).straight()
    demand(unsupported(operands.query.device, operands.query.dtype, **operands.sizes))
    return operands


def _forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    operands = _operands(query, key, value, *others)
    results = _forward_fake(query, key, value, *others)
    forward(operands, *results)
    return results


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _dim = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[-1])
    return output, query.new_empty(batch, heads, queries, dtype=torch.float32)


def _backward(grad: Tensor, output: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    operands = _operands(*inputs)
    grad = straight(grad)
    query, key, value = operands.query, operands.key, operands.value
    batch, kv_heads, keys, dim = key.shape
    delta = torch.empty_like(lse)
    grad_query = _by_token(query)
    grad_query_rope = None if operands.query_rope is None else _by_token(operands.query_rope)
    grad_of_queries(operands, grad, output, lse, delta, grad_query, grad_query_rope)

    parts = parts_of_group(operands)
    shape = (parts, batch, keys, kv_heads)
    # partial sums are kept in full precision
    dtype = key.dtype if parts == 1 else torch.float32
    grad_key = key.new_empty(*shape, dim, dtype=dtype)
    grad_value = value.new_empty(*shape, value.shape[-1], dtype=dtype)
    rotary = operands.key_rope
    grad_key_rope = (
        None if rotary is None else rotary.new_empty(*shape, rotary.shape[-1], dtype=torch.float32)
    )
    grad_of_keys(operands, grad, lse, delta, grad_key, grad_value, grad_key_rope)
    results = [
        grad_query.transpose(1, 2),
        *(_sum_of_parts(of).to(key.dtype).transpose(1, 2) for of in (grad_key, grad_value)),
    ]
    if grad_query_rope is not None and grad_key_rope is not None:
        shared = _sum_of_parts(grad_key_rope).sum(2, keepdim=True)
        results += [grad_query_rope.transpose(1, 2), shared.to(key.dtype).transpose(1, 2)]
    return results


def _by_token(tensor: Tensor) -> Tensor:
    """Room for a gradient, laid out [B, T, H, D] as the projection before it has it."""
    batch, heads, tokens, dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, dim)


def _sum_of_parts(partial: Tensor) -> Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _backward_fake(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
) -> list[Tensor]:
    inputs = (query, key, value, query_rope, key_rope)
    return [_by_token(tensor).transpose(1, 2) for tensor in inputs if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, span, scale, softcap, slopes, query_rope, key_rope = inputs
    ctx.save_for_backward(query, key, value, span, slopes, query_rope, key_rope, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.scale, ctx.softcap = scale, softcap


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, span, slopes, query_rope, key_rope, output, lse = ctx.saved_tensors
    grads = torch.ops.kvpatch.flash_backward(
        grad, output, lse, query, key, value, span, ctx.scale, ctx.softcap, slopes,
        query_rope, key_rope,
    )  # fmt: skip
    rotary = grads[3:] or (None, None)
    return *grads[:3], None, None, None, None, *rotary


def _no_second(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UsageError(
        "fused attention has no second derivative",
        hint="compute this layer with the eager attention implementation",
    )


register("flash_forward", f"({_OPERANDS}) -> (Tensor, Tensor)", _forward, _forward_fake)
register(
    "flash_backward",
    f"(Tensor grad, Tensor output, Tensor lse, {_OPERANDS}) -> Tensor[]",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("kvpatch::flash_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("kvpatch::flash_backward", _no_second)

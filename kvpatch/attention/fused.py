"""The seam between models and kernels: which op computes an attention, or why none can."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvpatch.kernels import device as kernels

__all__ = ["attend", "autocast", "choose", "constant", "obstacle"]

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Have Dynamo call a function of constants when it traces, and keep the answer."""
    kept: Callable[P, R] = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return kept


def _remembered(function: Callable[P, R]) -> Callable[P, R]:
    """The same, of a question that is asked at every step of every layer, answered once."""
    answer: Any = cache(function)

    @wraps(function)
    def ask(*arguments: P.args, **named: P.kwargs) -> R:
        found: R = answer(*arguments, **named)
        return found

    return constant(ask)


@constant
def obstacle(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None if they do.

    Args:
        device: Of the tensors.
    """
    return kernels.obstacle(device)


@_remembered
def _flash_obstacle(
    device: torch.device, dtype: torch.dtype, dim: int, value_dim: int, rope_dim: int
) -> str | None:
    from kvpatch.kernels import flash  # noqa: PLC0415 - it imports Triton

    return flash.unsupported(device, dtype, dim, value_dim, rope_dim)


@_remembered
def _decode_tokens(
    device: torch.device, dtype: torch.dtype, groups: int, dim: int, value_dim: int
) -> int:
    """Most query tokens that the decode op takes at once; 0 if it takes none of these sizes."""
    from kvpatch.kernels import decode  # noqa: PLC0415 - it imports Triton

    tokens = decode.MOST_ROWS // groups
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    key, value = (torch.empty(0, 1, 1, width, **made) for width in (dim, value_dim))
    why = decode.unsupported(torch.empty(0, groups, tokens, dim, **made), key, value)
    return tokens if why is None else 0


@_remembered
def _latent_obstacle(
    device: torch.device, dtype: torch.dtype, heads: int, rank: int, rope_dim: int
) -> str | None:
    from kvpatch.kernels import decode  # noqa: PLC0415 - it imports Triton

    made: dict[str, Any] = {"dtype": dtype, "device": device}
    # enough tokens for the largest tiles
    query, rope = (torch.empty(0, heads, 64, width, **made) for width in (rank, rope_dim))
    latent = torch.empty(0, 1, 1, rank, **made)
    return decode.latent_unsupported(query, rope, latent)


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[str, str | None]:
    """The op for an attention, and why it cannot compute it, or None if it can.

    Few queries are for ``decode`` if no gradient is wanted; one tensor as key and value, with a
    rotary part apart, for ``latent_decode``; all else for ``flash``. Operands as in ``attend``.
    """
    device, dtype = query.device, query.dtype
    dim, value_dim = key.shape[-1], value.shape[-1]
    rope_dim = 0 if query_rope is None else query_rope.shape[-1]
    why = obstacle(device)
    dtypes = {t.dtype for t in (query, key, value, query_rope) if t is not None}
    if why is None and len(dtypes) > 1:
        why = f"its dtypes are {', '.join(sorted(map(str, dtypes)))}"
    if query_rope is not None and value is key:
        if why is None and _differentiated(query, key):
            why = "there is no gradient of attention to latents"
        if why is None and slopes is not None:
            why = "attention to latents knows no ALiBi"
        why = why or _latent_obstacle(device, dtype, query.shape[1], dim, rope_dim)
        return "latent_decode", why
    if why is None and query_rope is None and not _differentiated(query, key, value):
        groups = query.shape[1] // key.shape[1]
        if query.shape[2] <= _decode_tokens(device, dtype, groups, dim, value_dim):
            return "decode", None
    return "flash", why or _flash_obstacle(device, dtype, dim, value_dim, rope_dim)


def attend(
    op: str,
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
    key_scale: Tensor | None = None,
) -> Tensor:
    """Attention as ``kvpatch.kernels.reference.attention`` says, by the op that was chosen.

    Args:
        op: As of ``choose``.
        query: [B, H, T, D].
        key: [B, Hkv, K, D], where H is a multiple of Hkv.
        value: [B, Hkv, K, Dv]; the key itself for attention to latents.
        span: int32 [B, T, 2].
        scale: Factor on the scores.
        softcap: Scores are bounded to plus and minus this; not at all if None.
        slopes: [H], of ALiBi.
        query_rope: [B, H, T, Dr].
        key_rope: [B, 1, K, Dr].
        key_scale: [B, groups of heads, K], factors on the scores of latents.

    Returns:
        [B, T, H, Dv].
    """
    from kvpatch.kernels import decode, flash  # noqa: PLC0415 - they import Triton

    how: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if op == "latent_decode":
        assert query_rope is not None
        assert key_rope is not None
        how["key_scale"] = key_scale
        return decode.latent_attention(query, query_rope, key, key_rope, span, **how)
    how["slopes"] = slopes
    if op == "decode":
        return decode.attention(query, key, value, span, **how)
    return flash.attention(query, key, value, span, query_rope=query_rope, key_rope=key_rope, **how)


def autocast(operand: Tensor) -> Tensor:
    """An operand in the dtype that a product would have here."""
    kind = operand.device.type
    if operand.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def _differentiated(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)

"""Attention of few queries to a cache of keys and values, or of latents (MLA).

There are no gradients. A call launches one kernel, or two where the keys are split, and the grid is
known from shapes alone: nothing waits for the device, and CUDA graphs can record it. What a cache
holds is read where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels.configs import architecture, config_for, find
from kvpatch.kernels.device import obstacle, processors
from kvpatch.kernels.launch import DTYPES, Operands, demand, register, strides
from kvpatch.kernels.merge import merge_kernel
from kvpatch.kernels.schedule import MOST_SPLITS, splits_for
from kvpatch.kernels.split import split_kernel

__all__ = ["MOST_ROWS", "attention", "latent_attention", "latent_unsupported", "unsupported"]

# rows, tokens times query heads of a KV head, from which on the flash op reads keys as rarely
MOST_ROWS = 128

_TILE_ROWS = 64  # of the largest tiles in the tables
_MERGED_COLUMNS = 128
_MERGED_SPLITS = 16
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor span, float scale, float? softcap, "
    "Tensor? slopes"
)
_LATENT_OPERANDS = (
    "Tensor query, Tensor query_rope, Tensor latent, Tensor key_rope, Tensor span, float scale, "
    "float? softcap, Tensor? key_scale"
)


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why ``attention`` cannot take these operands, or None if it can.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
    """
    rows = _rows(query, key)
    if rows > MOST_ROWS:
        return f"{rows} queries share a KV head, and this op packs at most {MOST_ROWS}"
    return _obstacle("decode", (query, key, value), _sizes(query, key, value))


def latent_unsupported(query: Tensor, query_rope: Tensor, latent: Tensor) -> str | None:
    """Why ``latent_attention`` cannot take these operands, or None if it can.

    Args:
        query: [B, H, T, R].
        query_rope: [B, H, T, Dr].
        latent: [B, 1, K, R].
    """
    sizes = _sizes(query, latent, latent, query_rope)
    return _obstacle("latent_decode", (query, query_rope, latent), sizes)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention of few queries to the keys of their spans, as ``reference.attention`` says.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, K, D], where H is a multiple of Hkv; any strides.
        value: [B, Hkv, K, Dv]; any strides.
        span: int32 [B, T, 2], non-decreasing in t.
        scale: Factor on the scores.
        softcap: Scores are bounded to plus and minus this; not at all if None.
        slopes: [H], of ALiBi.

    Returns:
        [B, T, H, Dv].

    Raises:
        UsageError: An operand requires a gradient, does not fit the others, or is not supported
            (see ``unsupported``).
    """
    _refuse_gradients(query, key, value, slopes)
    Operands(query, key, value, span, scale, softcap, slopes).checked()
    output: Tensor = torch.ops.kvpatch.decode(query, key, value, span, scale, softcap, slopes)
    return output


def latent_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Tensor | None = None,
) -> Tensor:
    """Absorbed latent attention of few queries, as ``reference.latent_attention`` says.

    Args:
        query: [B, H, T, R], times the key up-projection.
        query_rope: [B, H, T, Dr]; Dr may be 0.
        latent: [B, 1, K, R], key and value of all heads; any strides.
        key_rope: [B, 1, K, Dr]; any strides.
        span: int32 [B, T, 2], non-decreasing in t.
        scale: Factor on the scores.
        softcap: Scores are bounded to plus and minus this; not at all if None.
        key_scale: [B, Hkv, K], where H is a multiple of Hkv: one factor for each key and group of
            heads.

    Returns:
        [B, T, H, R].

    Raises:
        UsageError: An operand requires a gradient, does not fit the others, or is not supported
            (see ``latent_unsupported``).
    """
    _refuse_gradients(query, query_rope, latent, key_rope, key_scale)
    _latent(query, query_rope, latent, key_rope, span, scale, softcap, key_scale).checked()
    output: Tensor = torch.ops.kvpatch.latent_decode(
        query, query_rope, latent, key_rope, span, scale, softcap, key_scale
    )
    return output


def _refuse_gradients(*operands: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise UsageError(
            "attention to a cache has no gradient, and an operand requires one",
            hint="run the model under torch.no_grad(), or use the flash op, which has one",
        )


def _rows(query: Tensor, key: Tensor) -> int:
    """Queries that read the same keys: tokens times query heads of a KV head."""
    return query.shape[2] * (query.shape[1] // key.shape[1])


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, query_rope: Tensor | None = None
) -> dict[str, int]:
    """What the table of blocks is asked for; widths of operands that are not there are 0."""
    return {
        "dim": query.shape[-1],
        "value_dim": 0 if value is key else value.shape[-1],
        "rope_dim": 0 if query_rope is None else query_rope.shape[-1],
        "rows": min(_rows(query, key), _TILE_ROWS),
    }


def _obstacle(op: str, operands: tuple[Tensor, ...], sizes: Mapping[str, int]) -> str | None:
    dtypes = {t.dtype for t in operands}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"its dtypes are {', '.join(sorted(map(str, dtypes)))}"
    device = operands[0].device
    reason = obstacle(device)
    if reason is not None:
        return reason
    if find(op, architecture(device), operands[0].dtype, **sizes) is None:
        return f"{op} has no blocks for {', '.join(f'{name} {n}' for name, n in sizes.items())}"
    return None


def _run(op: str, operands: Operands) -> Tensor:
    """Start the kernels; where ``value`` is ``key``, each tile of it is loaded once."""
    query, key, value = operands.query, operands.key, operands.value
    batch, kv_heads, keys, _ = key.shape
    sizes = _sizes(query, key, value, operands.query_rope)
    config = config_for(op, query.device, query.dtype, **sizes)
    output = _decode_fake(query, key, value)
    programs = batch * kv_heads * -(-_rows(query, key) // config.block_m)
    if not programs:
        return output
    splits = splits_for(programs, -(-keys // config.block_n), processors(query.device))
    partial, total = output, None
    if splits > 1:
        total = output.new_empty(*output.shape[:3], splits, dtype=torch.float32)
        partial = total.new_empty(*total.shape, value.shape[-1])

    arguments = operands.arguments(config)
    if value is key:
        arguments |= {"value": None, **strides("value", "bhn", None)}
    factors = operands.key_scale
    split_kernel[programs * splits,](
        **arguments,
        **strides("key_scale", "bhn", factors),
        key_scale=factors,
        output=partial,
        total=total,
        kv_heads=kv_heads,
        scale_group=1 if factors is None else query.shape[1] // factors.shape[1],
        splits=splits,
    )
    if total is not None:
        _merge(partial, total, output)
    return output


def _merge(partial: Tensor, total: Tensor, output: Tensor) -> None:
    """Write [B, T, H, Dv] from the same of each split, [B, T, H, splits, Dv]."""
    value_dim = output.shape[-1]
    merge_kernel[output.shape[:3].numel(), -(-value_dim // _MERGED_COLUMNS)](
        partial=partial,
        total=total,
        output=output,
        splits=total.shape[-1],
        VALUE_DIM=value_dim,
        BLOCK_V=_MERGED_COLUMNS,
        BLOCK_SPLITS=_MERGED_SPLITS,
        MOST_SPLITS=MOST_SPLITS,
        enable_fp_fusion=True,  # the default of Triton changes with 3.10
    )


def _latent(
    query: Tensor,
    query_rope: Tensor | None,
    latent: Tensor,
    key_rope: Tensor | None,
    span: Tensor,
    scale: float,
    softcap: float | None,
    key_scale: Tensor | None,
) -> Operands:
    """Operands of latent attention: the latent is key and value of all heads."""
    return Operands(
        query,
        latent,
        latent,
        span,
        scale,
        softcap,
        query_rope=query_rope,
        key_rope=key_rope,
        key_scale=key_scale,
    )


def _decode(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    demand(unsupported(query, key, value))
    return _run("decode", Operands(query, key, value, *others).straight())


def _latent_decode(
    query: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, *others: Any
) -> Tensor:
    demand(latent_unsupported(query, query_rope, latent))
    rotary = (query_rope, key_rope) if query_rope.shape[-1] else (None, None)
    return _run("latent_decode", _latent(query, rotary[0], latent, rotary[1], *others).straight())


def _decode_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, queries, _dim = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1])


def _latent_decode_fake(query: Tensor, query_rope: Tensor, latent: Tensor, *others: Any) -> Tensor:
    return _decode_fake(query, latent, latent, *others)


register("decode", f"({_OPERANDS}) -> Tensor", _decode, _decode_fake)
register("latent_decode", f"({_LATENT_OPERANDS}) -> Tensor", _latent_decode, _latent_decode_fake)

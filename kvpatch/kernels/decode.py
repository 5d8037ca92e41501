"""Attention of few queries to a cache of keys and values, or of latents (MLA).

There are no gradients. A call launches one kernel, or two where the keys are split, and the grid is
known from shapes alone: nothing waits for the device, and CUDA graphs can record it. What a cache
holds is read where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels.configs import architecture, config_for, find
from kvpatch.kernels.device import obstacle, processors
from kvpatch.kernels.merge import merge_kernel
from kvpatch.kernels.schedule import MOST_SPLITS, splits_for
from kvpatch.kernels.split import split_kernel

__all__ = ["MOST_ROWS", "attention", "latent_attention", "latent_unsupported", "unsupported"]

# rows, tokens times query heads of a KV head, from which on the flash op reads keys as rarely
MOST_ROWS = 128

_TILE_ROWS = 64  # of the largest tiles in the tables
_LEAST_BLOCK = 16  # of a matrix product
_MERGED_COLUMNS = 128
_MERGED_SPLITS = 16
_LOG2_E = math.log2(math.e)
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor span, float scale, float? softcap, "
    "Tensor? slopes"
)
_LATENT_OPERANDS = (
    "Tensor query, Tensor query_rope, Tensor latent, Tensor key_rope, Tensor span, float scale, "
    "float? softcap, Tensor? key_scale"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    sizes = _sizes(query, latent, query_rope=query_rope)
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
        UsageError: An operand requires a gradient, or is not supported (see ``unsupported``).
    """
    _refuse_gradients(query, key, value, slopes)
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
        UsageError: An operand requires a gradient, or is not supported (see
            ``latent_unsupported``).
    """
    _refuse_gradients(query, query_rope, latent, key_rope, key_scale)
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
    query: Tensor, key: Tensor, value: Tensor | None = None, query_rope: Tensor | None = None
) -> dict[str, int]:
    """What the table of blocks is asked for; widths of operands that are not there are 0."""
    return {
        "dim": query.shape[-1],
        "value_dim": 0 if value is None else value.shape[-1],
        "rope_dim": 0 if query_rope is None else query_rope.shape[-1],
        "rows": min(_rows(query, key), _TILE_ROWS),
    }


def _obstacle(op: str, operands: tuple[Tensor, ...], sizes: Mapping[str, int]) -> str | None:
    dtypes = {t.dtype for t in operands}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return f"its dtypes are {', '.join(sorted(map(str, dtypes)))}"
    device = operands[0].device
    reason = obstacle(device)
    if reason is not None:
        return reason
    if find(op, architecture(device), operands[0].dtype, **sizes) is None:
        return f"{op} has no blocks for {', '.join(f'{name} {n}' for name, n in sizes.items())}"
    return None


def _padded(width: int) -> int:
    """The power of two that a block of this width has; 0 stays 0."""
    return max(_LEAST_BLOCK, 1 << (width - 1).bit_length()) if width else 0


def _straight(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _demand(reason: str | None) -> None:
    if reason is not None:
        raise UsageError(
            f"this kernel cannot run: {reason}",
            hint="use another attention implementation, such as sdpa",
        )


def _strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Arguments ``<name>_<axis>`` for each axis but "_"; 0 without a tensor."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": steps[at] for at, axis in enumerate(axes) if axis != "_"}


def _launch(
    op: str,
    query: Tensor,
    key: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None,
    value: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_scale: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Start the kernels; ``value`` is None where the keys are the values."""
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    sizes = _sizes(query, key, value, query_rope)
    value_dim = sizes["value_dim"] or dim
    config = config_for(op, query.device, query.dtype, **sizes)

    output = query.new_empty(batch, queries, heads, value_dim)
    programs = batch * kv_heads * -(-_rows(query, key) // config.block_m)
    if not programs:
        return output
    splits = splits_for(programs, -(-keys // config.block_n), processors(query.device))
    partial, total = output, None
    if splits > 1:
        total = output.new_empty(batch, queries, heads, splits, dtype=torch.float32)
        partial = total.new_empty(*total.shape, value_dim)

    inner, outer = scale * _LOG2_E, 0.0
    if softcap is not None:
        inner, outer = -2 * inner / softcap, softcap * _LOG2_E
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        split_kernel[programs * splits,](
            query=query,
            key=key,
            value=value,
            query_rope=query_rope,
            key_rope=key_rope,
            key_scale=key_scale,
            span=span,
            slopes=slopes,
            output=partial,
            total=total,
            **_strides("query", "bht", query),
            **_strides("key", "bhn", key),
            **_strides("value", "bhn", value),
            **_strides("query_rope", "bht", query_rope),
            **_strides("key_rope", "b_n", key_rope),
            **_strides("key_scale", "bhn", key_scale),
            **_strides("span", "bt", span),
            kv_heads=kv_heads,
            group=heads // kv_heads,
            scale_group=1 if key_scale is None else heads // key_scale.shape[1],
            queries=queries,
            keys=keys,
            splits=splits,
            inner=inner,
            outer=outer,
            DIM=dim,
            VALUE_DIM=value_dim,
            ROPE_DIM=sizes["rope_dim"],
            BLOCK_D=_padded(dim),
            BLOCK_V=_padded(value_dim),
            BLOCK_R=_padded(sizes["rope_dim"]),
            CAPPED=softcap is not None,
            BIASED=slopes is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # the default of Triton changes with 3.10
        )
        if total is not None:
            merge_kernel[total.shape[:3].numel(), -(-value_dim // _MERGED_COLUMNS)](
                partial=partial,
                total=total,
                output=output,
                splits=splits,
                VALUE_DIM=value_dim,
                BLOCK_V=_MERGED_COLUMNS,
                BLOCK_SPLITS=_MERGED_SPLITS,
                MOST_SPLITS=MOST_SPLITS,
                enable_fp_fusion=True,
            )
    return output


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    _demand(unsupported(query, key, value))
    return _launch(
        "decode",
        _straight(query),
        _straight(key),
        _straight(span),
        scale=scale,
        softcap=softcap,
        value=_straight(value),
        slopes=None if slopes is None else _straight(slopes),
    )


def _latent_decode(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    span: Tensor,
    scale: float,
    softcap: float | None,
    key_scale: Tensor | None,
) -> Tensor:
    _demand(latent_unsupported(query, query_rope, latent))
    rotary = query_rope.shape[-1] > 0
    return _launch(
        "latent_decode",
        _straight(query),
        _straight(latent),
        _straight(span),
        scale=scale,
        softcap=softcap,
        query_rope=_straight(query_rope) if rotary else None,
        key_rope=_straight(key_rope) if rotary else None,
        key_scale=key_scale,
    )


def _decode_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1])


def _latent_decode_fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape)


for _name, _operands, _compute, _fake in (
    ("kvpatch::decode", _OPERANDS, _decode, _decode_fake),
    ("kvpatch::latent_decode", _LATENT_OPERANDS, _latent_decode, _latent_decode_fake),
):
    torch.library.define(_name, f"({_operands}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_name, ("cpu", "cuda"), _compute)
    torch.library.register_fake(_name, _fake)

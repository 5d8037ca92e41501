"""Exact rewrites of a layer: another order of the dims of a head, norms absorbed, biases added.

None of them changes what the layer computes; each is rounded once, to the dtype of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.pool import wider

__all__ = [
    "absorb_norm",
    "absorb_norm_into_qkv",
    "half_split_order",
    "proportional_order",
    "reorder_heads",
    "with_all_biases",
]

_ROWS = 1024  # of a weight at a time bounds the wide copy


def absorb_norm(
    weight: Tensor, bias: Tensor | None, norm: Tensor, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias on a normalised input, of which the norm's own affine map is left out.

    ``W (g * x + b) + c = (W * g) x + (W b + c)``.

    Args:
        weight: [O, E].
        bias: [O]; None is zero.
        norm: Scale of the norm, [E].
        norm_bias: Shift of the norm, [E]; None is zero.

    Returns:
        [O, E] and [O], in the dtype of ``weight``.
    """
    wide = wider(weight.dtype)
    scaled = torch.empty_like(weight, memory_format=torch.contiguous_format)
    shift = torch.zeros(len(weight), dtype=wide) if bias is None else bias.to(wide, copy=True)
    for first in range(0, len(weight), _ROWS):
        rows = weight[first : first + _ROWS].to(wide)
        scaled[first : first + _ROWS] = (rows * norm.to(wide)).to(weight.dtype)
        if norm_bias is not None:
            shift[first : first + _ROWS] += rows @ norm_bias.to(wide)
    return scaled, shift.to(weight.dtype)


def absorb_norm_into_qkv(
    layer: AttentionLayer, norm: Tensor, norm_bias: Tensor | None
) -> AttentionLayer:
    """A layer whose queries, keys and values take the norm before them without its affine map."""
    fields: dict[str, Any] = {}
    for part in ("q", "k", "v"):
        heads: Tensor = getattr(layer, part)
        bias: Tensor | None = getattr(layer, f"{part}_bias")
        flat, shift = absorb_norm(
            heads.flatten(0, 1), None if bias is None else bias.flatten(), norm, norm_bias
        )
        fields |= {part: flat.view(heads.shape), f"{part}_bias": shift.view(heads.shape[:2])}
    return dataclasses.replace(layer, **fields)


def half_split_order(rotary_dim: int, head_dim: int) -> Tensor:
    """Order of the dims of a head that turns RoPE pairs (2i, 2i+1) into (i, i + rotary_dim / 2).

    Returns:
        Dim of the source for each dim of the result, [D].
    """
    rotating = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    return torch.cat([rotating, torch.arange(rotary_dim, head_dim)])


def proportional_order(rotary_dim: int, head_dim: int) -> Tensor:
    """Order of the dims of a head that turns RoPE pairs (i, i + rotary_dim / 2) into (i, i + D/2).

    The dims that do not rotate fill up both halves.

    Returns:
        Dim of the source for each dim of the result, [D].
    """
    rotating = torch.arange(rotary_dim).view(2, -1)
    still = torch.arange(rotary_dim, head_dim).view(2, -1)
    return torch.cat([rotating, still], 1).flatten()


def reorder_heads(layer: AttentionLayer, order: Tensor) -> AttentionLayer:
    """A layer whose queries and keys have their dims in another order; their products stay.

    Args:
        layer: Without query and key norms, which would have to follow.
        order: Dim of the source for each dim of the result, [D].
    """
    assert layer.q_norm is None
    assert layer.k_norm is None
    fields = {name: getattr(layer, name) for name in ("q", "k", "q_bias", "k_bias")}
    moved: Mapping[str, Any] = {n: f[:, order] for n, f in fields.items() if f is not None}
    return dataclasses.replace(layer, **moved)


def with_all_biases(layer: AttentionLayer) -> AttentionLayer:
    """A layer with a bias on every projection it has, zero where it had none."""
    fields: dict[str, Any] = {}
    for part in ("q", "k", "v", "o"):
        weight: Tensor | None = getattr(layer, part)
        if weight is not None and getattr(layer, f"{part}_bias") is None:
            shape = weight.shape[:1] if part == "o" else weight.shape[:2]
            fields[f"{part}_bias"] = torch.zeros(shape, dtype=weight.dtype)
    return dataclasses.replace(layer, **fields)

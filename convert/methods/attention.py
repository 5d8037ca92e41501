"""Attention computed from the canonical form: the same few lines for every model family.

Nothing but a rotation of planes stands between a projected query or key and its score, so the dims
of a head may be put in any order. Here they come as (first, second) of plane 0, of plane 1, and so
on, then the dims that do not rotate: a plane is one complex number in memory and RoPE a product.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import AttentionLayer, QkNorm
from convert.planes import planes_of

__all__ = [
    "Scoring",
    "attend",
    "key_factors",
    "keys",
    "logits",
    "plane_order",
    "project",
    "projected_queries",
    "queries",
    "rotate",
    "values",
    "weights",
    "with_head_order",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What turns the queries and keys of a layer into attention weights.

    Args:
        visible: [T, T] true where a query (row) sees a key (column).
        turn: [T, P] complex unit numbers, the rotation of each plane at each position, times any
            factor that a scaled RoPE puts on it.
        scale: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``; None for none.
        clip: Clamp on queries, keys and values; None for none.
        offset: [H, T, T] added to the scores, as ALiBi does; None for none.
        norm: Norm of queries and keys between projection and rotation; None for none.
        norm_eps: Its epsilon.
    """

    visible: Tensor
    turn: Tensor
    scale: float
    softcap: float | None = None
    clip: float | None = None
    offset: Tensor | None = None
    norm: QkNorm | None = None
    norm_eps: float = 0.0


def plane_order(layer: AttentionLayer) -> Tensor:
    """Dims of a head, planes side by side: [first 0, second 0, first 1, ..., rest]."""
    assert layer.rope is not None
    planes = planes_of(layer.rope, layer.geometry.head_dim)
    return torch.cat([torch.stack([planes.first, planes.second], 1).flatten(), planes.rest])


def with_head_order(layer: AttentionLayer, order: Tensor) -> AttentionLayer:
    """The layer with the dims of its query and key heads reordered; scores do not change."""
    fields = {}
    for part in ("q", "k"):
        for name in (part, f"{part}_bias", f"{part}_norm", f"{part}_norm_bias"):
            tensor = getattr(layer, name)
            if tensor is not None:
                fields[name] = tensor.index_select(1 if name in {"q", "k"} else -1, order)
    return dataclasses.replace(layer, **fields)


def rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """Apply RoPE to [..., T, D] in plane order; ``turn.conj()`` undoes it."""
    planes = turn.shape[1]
    if not planes:
        return heads
    turning = heads[..., : 2 * planes].reshape(*heads.shape[:-1], planes, 2)
    turned = torch.view_as_real(torch.view_as_complex(turning) * turn).flatten(-2)
    return torch.cat([turned, heads[..., 2 * planes :]], -1)


def project(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """[H, D, E] on [N, T, E]: heads [N, H, T, D]."""
    flat = inputs @ weight.flatten(0, 1).mT
    heads = flat.reshape(*inputs.shape[:-1], *weight.shape[:2]).transpose(1, 2)
    return heads if bias is None else heads + bias[:, None]


def queries(layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Tensor:
    """Rotated queries [N, H, T, D] of inputs [N, T, E]."""
    return rotate(projected_queries(layer, scoring, inputs), scoring.turn)


def projected_queries(layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Tensor:
    """Queries [N, H, T, D] of inputs [N, T, E] as they are before rotation."""
    assert layer.q is not None
    heads = project(layer.q, layer.q_bias, inputs)
    heads = _between(heads, scoring, layer.q_norm, layer.q_norm_bias)
    return heads if layer.q_map is None else heads @ layer.q_map.mT


def keys(layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Tensor:
    """Rotated keys [N, Hkv, T, D] of inputs [N, T, E]."""
    assert layer.k is not None
    heads = project(layer.k, layer.k_bias, inputs)
    heads = _between(heads, scoring, layer.k_norm, layer.k_norm_bias)
    return rotate(heads, scoring.turn)


def key_factors(
    norm: QkNorm, eps: float, weight: Tensor, bias: Tensor | None, inputs: Tensor
) -> Tensor:
    """What the norm multiplies keys by, [N, Hkv or 1, T], beside its weight.

    Args:
        norm: Of the layer.
        eps: Its epsilon.
        weight: [Hkv, D, E] key projection.
        bias: [Hkv, D].
        inputs: [N, T, E].
    """
    return _centred_and_factor(project(weight, bias, inputs), norm, eps)[1].squeeze(3)


def values(layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Tensor:
    """Values [N, Hkv, T, Dv] of inputs [N, T, E]."""
    assert layer.v is not None
    heads = project(layer.v, layer.v_bias, inputs)
    return heads if scoring.clip is None else heads.clamp(-scoring.clip, scoring.clip)


def logits(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """Scaled scores [N, H, T, T] of rotated queries and keys, before cap, offset and mask."""
    return (_grouped(query * scoring.scale, key) @ key[:, :, None].mT).flatten(1, 2)


def weights(scores: Tensor, scoring: Scoring) -> Tensor:
    """Attention weights [..., H, T, T] of scores."""
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.offset is not None:
        scores = scores + scoring.offset
    return scores.masked_fill(~scoring.visible, -torch.inf).softmax(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Head outputs [N, T, H, Dv].

    Args:
        query: Rotated queries [N, H, T, D].
        key: Rotated keys [N, Hkv, T, D], of this layer or of the one it shares with.
        value: [N, Hkv, T, Dv].
        scoring: How scores become weights.
    """
    mixed = weights(logits(query, key, scoring), scoring)
    heads = _grouped(mixed, value) @ value[:, :, None]
    return heads.flatten(1, 2).transpose(1, 2)


def _grouped(heads: Tensor, read: Tensor) -> Tensor:
    """[N, H, T, n] as [N, Hkv, H / Hkv, T, n] beside what the groups read, [N, Hkv, ...]."""
    return heads.reshape(len(heads), read.shape[1], -1, *heads.shape[2:])


def _between(heads: Tensor, scoring: Scoring, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Norm and clamp between projection and rotation of heads [N, H, T, D]."""
    norm = scoring.norm
    if norm is not None and weight is not None:
        heads, factor = _centred_and_factor(heads, norm, scoring.norm_eps)
        heads = heads * factor
        scale = weight + 1 if norm.formula == "rms_plus_one" else weight
        heads = heads * (scale if norm.layout == "shared" else scale[:, None])
        if bias is not None:
            heads = heads + (bias if norm.layout == "shared" else bias[:, None])
    return heads if scoring.clip is None else heads.clamp(-scoring.clip, scoring.clip)


def _centred_and_factor(heads: Tensor, norm: QkNorm, eps: float) -> tuple[Tensor, Tensor]:
    """Heads [N, H, T, D] without their mean if the norm takes it out, and its factor."""
    over = (1, 3) if norm.layout == "full" else (3,)
    if norm.formula == "layer":
        heads = heads - heads.mean(over, keepdim=True)
    return heads, (heads.square().mean(over, keepdim=True) + eps).rsqrt()

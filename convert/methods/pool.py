"""Published pooling: heads become their mean, or the first of them.

Source: Ainslie et al., GQA, arXiv:2305.13245, section 2.1 (mean pooling) and figure 4 (first head).
For layers that share (Brandon et al., CLA, arXiv:2405.12981) it is the mean over the layers, or the
first layer's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods import Converted, Method
from convert.methods.group import Group, adjacent
from convert.methods.merge import Inputs, Loss
from convert.planes import key_covariance, planes_of, real_covariance, split

__all__ = [
    "MERGES",
    "Merge",
    "best_keys",
    "first",
    "lost_energy",
    "mean",
    "pool",
    "pooling",
    "wider",
]

Merge = Literal["mean", "first"]

_NORMS = ("k_norm", "k_norm_bias")
_KV_FIELDS = ("k", "v", "k_bias", "v_bias", *_NORMS)
# heads times dims without RoPE beyond which an eigendecomposition takes longer than the conversion
_WIDEST = 1024


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float32 and float64, float32 for the 16-bit ones.

    One step wider makes the sum of up to 2**16 equal heads exact, so that heads which are copies
    of each other merge without any rounding.
    """
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def mean(heads: Sequence[Tensor], kv_heads: int) -> Tensor:
    """Mean of each group: adjacent heads, at the same place in every layer.

    Args:
        heads: [Hkv, ...] of each layer, any float dtype.
        kv_heads: Number of groups; divides Hkv.

    Returns:
        [kv_heads, ...] in the dtype of ``heads``, rounded once.
    """
    grouped = [layer.reshape(kv_heads, -1, *layer.shape[1:]) for layer in heads]
    out = torch.empty_like(grouped[0][:, 0])
    for group in range(kv_heads):  # one group at a time bounds the wide copy
        members = torch.cat([layer[group] for layer in grouped])
        out[group] = members.to(wider(members.dtype)).mean(0).to(out.dtype)
    return out


def first(heads: Sequence[Tensor], kv_heads: int) -> Tensor:
    """First head of each group, of the first layer: [Hkv, ...] -> [kv_heads, ...]."""
    return heads[0][:: len(heads[0]) // kv_heads].contiguous()


MERGES: Mapping[Merge, Callable[[Sequence[Tensor], int], Tensor]] = {"mean": mean, "first": first}


def lost_energy(heads: Tensor, pooled: Tensor) -> Loss:
    """Squared norm of ``heads`` [Hkv, ...] that ``pooled`` [G, ...] does not keep.

    ``|w_h - pooled_g(h)|^2`` of each head h: nothing for heads that are copies, and in all a share
    of (g - 1) / g for the mean of g unrelated heads.
    """
    total, lost = torch.zeros(2, len(heads), dtype=torch.float64)
    size = len(heads) // len(pooled)
    for index, head in enumerate(heads):
        wide = head.to(wider(head.dtype), copy=True)
        total[index] = _energy(wide)
        wide -= pooled[index // size].to(wide.dtype)
        lost[index] = _energy(wide)
    return Loss(total, lost)


def _energy(values: Tensor) -> float:
    """Squared norm, summed over the last dim in the dtype of ``values`` and then in float64."""
    return float(torch.linalg.vecdot(values, values).double().sum())


def pool(layers: Sequence[AttentionLayer], *, kv_heads: int, merge: Merge) -> list[AttentionLayer]:
    """Pool every KV tensor of a unit to ``kv_heads`` heads; queries and output stay as they are.

    Args:
        layers: Layers that share; the first one produces, the others have no KV tensors afterwards.
        kv_heads: KV heads of each layer afterwards.
        merge: What becomes of the heads of a group.

    Raises:
        ValueError: If ``kv_heads`` does not divide the layers' KV heads.
    """
    geometry = layers[0].geometry
    if kv_heads < 1 or geometry.kv_heads % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not divide {geometry.kv_heads}")
    pooled: dict[str, Any] = {}
    for name in _KV_FIELDS:
        heads = [getattr(layer, name) for layer in layers]
        if any(head is None for head in heads):
            continue
        if name in _NORMS and heads[0].dim() == 1:  # one weight for all heads of a layer
            pooled[name] = MERGES[merge]([head[None] for head in heads], 1)[0]
        else:
            pooled[name] = MERGES[merge](heads, kv_heads)
    smaller = dataclasses.replace(geometry, kv_heads=kv_heads)
    return [
        dataclasses.replace(
            layer, geometry=smaller, **(dict.fromkeys(_KV_FIELDS) if index else pooled)
        )
        for index, layer in enumerate(layers)
    ]


def pooling(*, kv_heads: int, merge: Merge) -> Method:
    """The method for the engine; it reports the lost energy of ``k`` and of ``v``.

    Beside the keys stands what the best merge of the same heads would lose (``best_keys``).
    """

    def convert(layers: Sequence[AttentionLayer], _: Inputs | None) -> Converted:
        pooled = pool(layers, kv_heads=kv_heads, merge=merge)
        results: list[dict[str, Any]] = []
        for layer in layers:
            result: dict[str, Any] = {}
            for part in ("k", "v"):
                loss = lost_energy(getattr(layer, part), getattr(pooled[0], part))
                result |= {f"lost_energy_{part}": loss.share, f"lost_heads_{part}": loss.shares}
            results.append(result)
        best = best_keys(layers, adjacent(layers[0].geometry.kv_heads, kv_heads, len(layers)))
        if best is not None:
            results[0]["svd_lost_energy_k"] = best
        return pooled, results

    return Method(
        reads=frozenset({"k", "v", "k_norm"}),
        outline=partial(pool, kv_heads=kv_heads, merge="first"),
        convert=convert,
        # copies of a group of heads in the accumulation dtype, twice as wide: as planes, weighed
        # and read, each complex number being two
        working_bytes=lambda largest: 12 * largest // kv_heads,
    )


def best_keys(layers: Sequence[AttentionLayer], groups: Sequence[Group]) -> float | None:
    """Least share of key energy that any merge of these groups can lose, all weighed alike.

    It compares with what the mean loses: both leave aside what the queries look for. None where
    keys have a norm, which stands in the way of other merges, or where finding out is expensive.

    Args:
        layers: A unit of layers, with k and ``rope``.
        groups: Members ``layer * Hkv + head`` of every new head.
    """
    rope, geometry = layers[0].rope, layers[0].geometry
    if rope is None or any(layer.k_norm is not None for layer in layers):
        return None
    planes = planes_of(rope, geometry.head_dim)
    if len(planes.rest) * len(groups[0]) > _WIDEST:
        return None
    total = kept = 0.0
    for group in groups:
        places = [divmod(member, geometry.kv_heads) for member in group]
        heads = torch.stack([_own(layers[layer].k)[head] for layer, head in places])
        turning, rest = split(heads.to(wider(heads.dtype)), planes)
        even = torch.ones(turning.shape[:2], dtype=rest.dtype)
        values = torch.linalg.eigvalsh(key_covariance(turning, even, None))
        metrics = torch.eye(rest.shape[1], dtype=rest.dtype).expand(len(group), -1, -1)
        width = rest.shape[1]
        still = real_covariance(rest, metrics, None).reshape(2 * (len(group) * width,))
        spread = torch.linalg.eigvalsh(still) if width else still.new_zeros(1)
        total += float(values.sum() + spread.sum())
        kept += float(values[:, -1].sum() + spread[-width:].sum() * bool(width))
    return max(0.0, 1 - kept / total) if total else 0.0


def _own(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor

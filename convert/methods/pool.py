"""Published KV-head pooling: neighbouring heads become their mean, or the first of them.

Source: Ainslie et al., GQA, arXiv:2305.13245, section 2.1 (mean pooling) and figure 4 (first head).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods import Method

__all__ = ["MERGES", "Merge", "first", "lost_energy", "mean", "pool", "pooling", "wider"]

Merge = Literal["mean", "first"]

_KV_FIELDS = ("k", "v", "k_bias", "v_bias", "k_norm")


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float32 and float64, float32 for the 16-bit ones.

    One step wider makes the sum of up to 2**16 equal heads exact, so that heads which are copies
    of each other merge without any rounding.
    """
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def mean(heads: Tensor, kv_heads: int) -> Tensor:
    """Mean of each group of adjacent heads.

    Args:
        heads: [Hkv, ...], any float dtype.
        kv_heads: Number of groups; divides Hkv.

    Returns:
        [kv_heads, ...] in the dtype of ``heads``, rounded once.
    """
    grouped = heads.reshape(kv_heads, -1, *heads.shape[1:])
    out = torch.empty_like(grouped[:, 0])
    for group, members in enumerate(grouped):  # one group at a time bounds the wide copy
        out[group] = members.to(wider(heads.dtype)).mean(0).to(heads.dtype)
    return out


def first(heads: Tensor, kv_heads: int) -> Tensor:
    """First head of each group of adjacent heads: [Hkv, ...] -> [kv_heads, ...]."""
    return heads[:: len(heads) // kv_heads].contiguous()


MERGES: Mapping[Merge, Callable[[Tensor, int], Tensor]] = {"mean": mean, "first": first}


def lost_energy(heads: Tensor, pooled: Tensor) -> float:
    """Share of the squared norm of ``heads`` [Hkv, ...] that ``pooled`` [G, ...] does not keep.

    ``sum_h |w_h - pooled_g(h)|^2 / sum_h |w_h|^2``: 0 for heads that are copies, and (g - 1) / g
    for the mean of g unrelated heads. Zero weights lose nothing.
    """
    lost = total = 0.0
    size = len(heads) // len(pooled)
    for index, head in enumerate(heads):
        wide = head.to(wider(heads.dtype), copy=True)
        total += _energy(wide)
        wide -= pooled[index // size].to(wide.dtype)
        lost += _energy(wide)
    return lost / total if total else 0.0


def _energy(values: Tensor) -> float:
    """Squared norm, summed over the last dim in the dtype of ``values`` and then in float64."""
    return float(torch.linalg.vecdot(values, values).double().sum())


def pool(layer: AttentionLayer, *, kv_heads: int, merge: Merge) -> AttentionLayer:
    """Pool every KV tensor of a layer to ``kv_heads`` heads; queries and output stay as they are.

    Raises:
        ValueError: If ``kv_heads`` does not divide the layer's KV heads.
    """
    geometry = layer.geometry
    if kv_heads < 1 or geometry.kv_heads % kv_heads:
        raise ValueError(f"{kv_heads} KV heads do not divide {geometry.kv_heads}")
    pooled: dict[str, Any] = {}
    for name in _KV_FIELDS:
        heads = getattr(layer, name)
        if heads is not None and not (name == "k_norm" and heads.dim() == 1):
            pooled[name] = MERGES[merge](heads, kv_heads)
    return dataclasses.replace(
        layer, geometry=dataclasses.replace(geometry, kv_heads=kv_heads), **pooled
    )


def pooling(*, kv_heads: int, merge: Merge) -> Method:
    """The method for the engine; it reports the lost energy of ``k`` and of ``v``."""

    def convert(layer: AttentionLayer) -> tuple[AttentionLayer, Mapping[str, Any]]:
        pooled = pool(layer, kv_heads=kv_heads, merge=merge)
        assert layer.k is not None
        assert layer.v is not None
        assert pooled.k is not None
        assert pooled.v is not None
        return pooled, {
            "lost_energy_k": lost_energy(layer.k, pooled.k),
            "lost_energy_v": lost_energy(layer.v, pooled.v),
        }

    return Method(
        reads=frozenset({"k", "v", "k_norm"}),
        outline=partial(pool, kv_heads=kv_heads, merge="first"),
        convert=convert,
        # three copies of a group of heads in the accumulation dtype, twice as wide
        working_bytes=lambda largest: 6 * largest // kv_heads,
    )

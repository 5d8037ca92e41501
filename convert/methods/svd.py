"""The svd merge as the engine sees it: grouping, then keys and values by weighted PCA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from convert.layer import AttentionLayer
from convert.methods import Method
from convert.methods.group import adjacent, similar
from convert.methods.merge import merge_heads, merge_values, moments_of
from convert.methods.pool import lost_energy, mean, pool

__all__ = ["Grouping", "svd_merge"]

Grouping = Literal["adjacent", "similar"]


def svd_merge(*, kv_heads: int, grouping: Grouping) -> Method:
    """Merge the KV heads of a layer without data: all inputs count as equally likely.

    Where queries and keys have a norm of their own, which mixing heads would change, the exact
    subset that remains is used: neighbouring keys are averaged, values are merged.

    Args:
        kv_heads: KV heads of a layer afterwards.
        grouping: Neighbours, or the heads that lose least together.
    """

    def convert(layer: AttentionLayer) -> tuple[AttentionLayer, Mapping[str, Any]]:
        heads = layer.geometry.kv_heads
        if layer.k_norm is not None:
            return _values_only(layer, kv_heads)
        groups = adjacent(heads, kv_heads)
        if grouping == "similar" and 1 < kv_heads < heads:
            groups = similar(moments_of(layer, None), kv_heads)
        merged, losses = merge_heads(layer, groups)
        return merged, {
            "groups": [list(group) for group in groups],
            "lost_energy_k": losses["k"].share,
            "lost_energy_v": losses["v"].share,
        }

    return Method(
        reads=frozenset({"q", "k", "v", "o", "q_norm", "k_norm"}),
        outline=partial(pool, kv_heads=kv_heads, merge="first"),
        convert=convert,
        # queries, keys, values and output in float64, each some three times over
        working_bytes=lambda largest: 48 * largest,
    )


def _values_only(layer: AttentionLayer, kv_heads: int) -> tuple[AttentionLayer, Mapping[str, Any]]:
    groups = adjacent(layer.geometry.kv_heads, kv_heads)
    merged, loss = merge_values(layer, groups)
    assert layer.k is not None
    keys = pool(dataclasses.replace(layer, v=None, v_bias=None), kv_heads=kv_heads, merge="mean")
    joined = dataclasses.replace(keys, v=merged.v, v_bias=merged.v_bias, o=merged.o)
    return joined, {
        "groups": [list(group) for group in groups],
        "lost_energy_k": lost_energy(layer.k, mean(layer.k, kv_heads)),
        "lost_energy_v": loss.share,
    }

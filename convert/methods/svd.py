"""The svd merge as the engine sees it: grouping, then keys and values by weighted PCA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from convert.layer import AttentionLayer
from convert.methods import Converted, Method
from convert.methods.group import Group, adjacent, similar
from convert.methods.merge import Inputs, Loss, merge_heads, merge_values, moments_of
from convert.methods.pool import lost_energy, pool

__all__ = ["Grouping", "svd_merge"]

Grouping = Literal["adjacent", "similar"]


def svd_merge(*, kv_heads: int, grouping: Grouping) -> Method:
    """Merge the KV heads of a unit of layers.

    Where queries and keys have a norm of their own, which mixing heads would change, the exact
    subset that remains is used: neighbouring keys of the first layer are averaged, values are
    merged.

    Args:
        kv_heads: KV heads of a layer afterwards.
        grouping: Neighbours, or the heads that lose least together.
    """

    def convert(layers: Sequence[AttentionLayer], inputs: Inputs | None) -> Converted:
        heads, count = layers[0].geometry.kv_heads, len(layers)
        groups = adjacent(heads, kv_heads, count)
        if any(layer.k_norm is not None for layer in layers):
            return _values_only(layers, groups, inputs)
        if grouping == "similar" and (1 < kv_heads < heads or (count > 1 and kv_heads > 1)):
            groups = similar(moments_of(layers, inputs), kv_heads)
        merged, losses = merge_heads(layers, groups, inputs)
        return merged, _results(groups, losses, count, heads)

    return Method(
        reads=frozenset({"q", "k", "v", "o", "q_norm", "k_norm"}),
        outline=partial(pool, kv_heads=kv_heads, merge="first"),
        convert=convert,
        # queries, keys, values and output in float64, each some three times over
        working_bytes=lambda largest: 48 * largest,
    )


def _values_only(
    layers: Sequence[AttentionLayer], groups: Sequence[Group], inputs: Inputs | None
) -> Converted:
    merged, loss = merge_values(layers, groups, inputs)
    bare = dataclasses.replace(layers[0], v=None, v_bias=None)
    producer = pool([bare], kv_heads=len(groups), merge="mean")[0]
    keys = {name: getattr(producer, name) for name in ("k", "k_bias", "k_norm", "k_norm_bias")}
    merged[0] = dataclasses.replace(merged[0], **keys)
    assert producer.k is not None
    lost = [lost_energy(_keys(layer), producer.k) for layer in layers]
    results = _results(groups, {"v": loss}, len(layers), layers[0].geometry.kv_heads)
    for result, part in zip(results, lost, strict=True):
        result |= {"lost_energy_k": part.share, "lost_heads_k": part.shares}
    return merged, results


def _keys(layer: AttentionLayer) -> Any:
    assert layer.k is not None
    return layer.k


def _results(
    groups: Sequence[Group], losses: Mapping[str, Loss], layers: int, heads: int
) -> list[dict[str, Any]]:
    """What each layer lost, and which of its heads went into each KV head."""
    results: list[dict[str, Any]] = [
        {
            "groups": [
                [member % heads for member in group if member // heads == layer] for group in groups
            ]
        }
        for layer in range(layers)
    ]
    for part, loss in losses.items():
        for result, own in zip(results, loss.of_layers(layers), strict=True):
            result |= {f"lost_energy_{part}": own.share, f"lost_heads_{part}": own.shares}
    return results

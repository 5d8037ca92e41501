"""Merging KV heads by weighted PCA, with the queries and the output absorbing what they can.

Keys are merged plane by plane as complex functionals (``convert.planes``), each query taking up the
conjugate of its head's coefficient; values are merged under the metric of the output projection,
which takes up the map back. Nothing of this changes the class: the result is an ordinary GQA layer.
Contains mean pooling and rotary-aware alignment (arXiv:2412.20677) as special cases; for values and
keys without RoPE it is the low-rank view of grouping of arXiv:2406.07056.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.planes import Planes, join, merge_complex, merge_real, planes_of, split

__all__ = ["Groups", "Loss", "Moments", "merge_heads", "merge_values", "moments_of"]

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Moments:
    """What merging needs to know of a layer, in float64.

    Args:
        key: [Hkv, D, E'] rows with the bias as last column.
        value: [Hkv, Dv, E'].
        query: [H, D, E'].
        planes: RoPE planes of a head.
        moment: [E', E'] second moment of the augmented input; None for the identity.
        query_energy: [Hkv, P] energy of the queries of each KV head, plane by plane.
        query_metric: [Hkv, N, N] second moment of their dims without RoPE.
        output_metric: [Hkv, Dv, Dv] sum of ``O^T O`` over the query heads of each KV head.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    planes: Planes
    moment: Tensor | None
    query_energy: Tensor
    query_metric: Tensor
    output_metric: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Weighted energy in all of a layer's keys or values, and the part that merging loses."""

    total: float
    lost: float

    @property
    def share(self) -> float:
        """Lost share, 0 where there is nothing to lose."""
        return max(0.0, self.lost) / self.total if self.total > 0 else 0.0


def moments_of(layer: AttentionLayer, moment: Tensor | None) -> Moments:
    """Collect weights and metrics of a layer.

    Args:
        layer: All of q, k, v, o and ``rope`` present; without query/key norms.
        moment: [E + 1, E + 1] second moment of [x; 1] in float64; None for the identity.
    """
    assert layer.rope is not None
    geometry = layer.geometry
    key, value, query = (
        _augmented(getattr(layer, part), getattr(layer, f"{part}_bias")) for part in "kvq"
    )
    assert layer.o is not None
    output = layer.o.double()
    planes = planes_of(layer.rope, geometry.head_dim)
    turning, rest = split(query, planes)
    members = (geometry.kv_heads, geometry.group)

    def read(rows: Tensor) -> Tensor:
        return rows if moment is None else rows @ moment.to(rows.dtype)

    energy = (read(turning) * turning.conj()).real.sum(-1)
    metric = read(rest) @ rest.mT
    gram = torch.einsum("ehd,ehf->hdf", output, output)
    return Moments(
        key=key,
        value=value,
        query=query,
        planes=planes,
        moment=moment,
        query_energy=energy.reshape(*members, -1).sum(1),
        query_metric=metric.reshape(*members, *metric.shape[1:]).sum(1),
        output_metric=gram.reshape(*members, *gram.shape[1:]).sum(1),
    )


def merge_heads(
    layer: AttentionLayer, groups: Groups, moment: Tensor | None = None
) -> tuple[AttentionLayer, Mapping[str, Loss]]:
    """Replace each group of KV heads by the one that serves its queries and outputs best.

    Args:
        layer: The layer, with q, k, v, o and ``rope``.
        groups: Members of every new KV head; a partition of the KV heads into equal sizes.
            Query heads and output columns are reordered so that the groups are adjacent.
        moment: [E + 1, E + 1] second moment of the input with a constant 1; None for identity.

    Returns:
        The layer with ``len(groups)`` KV heads, in the dtypes it had, and what keys (``k``) and
        values (``v``) lost, in the weighted energy that was minimised.
    """
    facts = moments_of(layer, moment)
    turning, rest = split(facts.key, facts.planes)
    query_turning, query_rest = split(facts.query, facts.planes)  # indexing copies
    keys, key_loss = [], Loss(0.0, 0.0)
    for group in groups:
        members = list(group)
        key = merge_complex(turning[members], facts.query_energy[members], moment)
        still = merge_real(rest[members], facts.query_metric[members], moment)
        keys.append(join(key.rows[None], still.rows[None], facts.planes)[0])
        key_loss = _add(key_loss, key.total + still.total, key.lost + still.lost)
        for place, member in enumerate(members):
            for head in range(member * layer.geometry.group, (member + 1) * layer.geometry.group):
                query_turning[head] *= key.maps[place].conj()[:, None]
                query_rest[head] = still.maps[place].mT @ query_rest[head]
    valued, value_loss = merge_values(layer, groups, moment)
    assert valued.o is not None
    order = _query_order(groups, layer.geometry.group)
    query = join(query_turning, query_rest, facts.planes)[order]
    merged = dataclasses.replace(
        valued,
        geometry=dataclasses.replace(layer.geometry, kv_heads=len(groups)),
        o=valued.o[:, order],
        **_rows(layer, q=query, k=torch.stack(keys)),
    )
    return merged, {"k": key_loss, "v": value_loss}


def merge_values(
    layer: AttentionLayer, groups: Groups, moment: Tensor | None = None
) -> tuple[AttentionLayer, Loss]:
    """The part of ``merge_heads`` that keys with a norm of their own leave possible.

    A norm between projection and score does not commute with mixing heads, so keys are left to
    the caller; values have no norm and are merged as always.

    Args:
        layer: The layer, with v and o.
        groups: Members of every new KV head; output columns stay in their order.
        moment: [E + 1, E + 1] second moment of the input with a constant 1; None for identity.
    """
    assert layer.v is not None
    assert layer.o is not None
    value, output = _augmented(layer.v, layer.v_bias), layer.o.double()
    gram = torch.einsum("ehd,ehf->hdf", output, output)
    metric = gram.reshape(layer.geometry.kv_heads, -1, *gram.shape[1:]).sum(1)
    values, loss = [], Loss(0.0, 0.0)
    output = output.clone()
    for group in groups:
        members = list(group)
        merged = merge_real(value[members], metric[members], moment)
        values.append(merged.rows)
        loss = _add(loss, merged.total, merged.lost)
        for place, member in enumerate(members):
            for head in range(member * layer.geometry.group, (member + 1) * layer.geometry.group):
                output[:, head] = output[:, head] @ merged.maps[place]
    fields = _rows(layer, v=torch.stack(values))
    return dataclasses.replace(layer, o=output.to(layer.o.dtype), **fields), loss


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, D, E] and [n, D] as rows [n, D, E + 1] in float64."""
    column = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return torch.cat([weight.double(), column.double()[..., None]], -1)


def _rows(layer: AttentionLayer, **heads: Tensor) -> dict[str, Any]:
    """Rows back into weights and biases; a bias that was absent stays absent, being zero."""
    fields: dict[str, Any] = {}
    for part, rows in heads.items():
        weight, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
        fields[part] = rows[..., :-1].to(weight.dtype)
        fields[f"{part}_bias"] = None if bias is None else rows[..., -1].to(bias.dtype)
    return fields


def _query_order(groups: Groups, per_member: int) -> list[int]:
    return [
        head
        for group in groups
        for member in group
        for head in range(member * per_member, (member + 1) * per_member)
    ]


def _add(loss: Loss, total: float, lost: float) -> Loss:
    return Loss(loss.total + total, loss.lost + lost)

"""Merging KV heads in closed form, of one layer or of layers that share.

Each head has a basis of its own, so averaging heads cancels most of them. Instead, the members of a
group become multiples of one key, complex in every RoPE plane, chosen so that the scores lose the
least energy; the multiple moves into the query projection, with which it commutes. Values become
linear maps of one value, chosen so that what reaches the residual stream loses the least; the map
moves into the output projection.

Members may come from several layers (CLA). The first layer of such a unit produces the keys and
values, so the functionals of the others are first replaced by their best prediction from its input,
a least squares fit that the second moments of the inputs determine.

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

from convert.layer import AttentionLayer, Geometry
from convert.methods.halves import covariance, powers
from convert.planes import Planes, join, merge_complex, merge_real, planes_of, split

__all__ = [
    "Groups",
    "Inputs",
    "Loss",
    "Moments",
    "augmented",
    "merge_heads",
    "merge_values",
    "moments_of",
    "prediction",
    "query_order",
]

Groups = Sequence[Sequence[int]]
# of the mean power of the producer's input: predictions of what hardly occurs stay small
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Inputs:
    """Second moments of the inputs [x; 1] of the layers of a unit, in float64.

    Args:
        own: [E + 1, E + 1] of each layer with itself, ``E[x_i x_i^T]``.
        cross: [E + 1, E + 1] of each layer with the first, ``E[x_i x_0^T]``.
    """

    own: tuple[Tensor, ...]
    cross: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Moments:
    """What merging needs to know of a unit of layers, in float64.

    KV head h of layer i is member ``i * Hkv + h``, M members in all.

    Args:
        geometry: Of each layer.
        key: [M, D, E'] rows that read the first layer's input, the bias as last column.
        value: [M, Dv, E'].
        query: [H, D, E'] of each layer; they read their own input.
        planes: RoPE planes of a head.
        moment: [E', E'] second moment of the first layer's input; None for the identity.
        query_energy: [M, P] energy of the queries of each member, plane by plane.
        query_metric: [M, N, N] second moment of their dims without RoPE.
        output_metric: [M, Dv, Dv] sum of ``O^T O`` over the query heads of each member.
        key_unpredicted: [M] energy of a member that the first layer's input cannot give.
        value_unpredicted: [M].
    """

    geometry: Geometry
    key: Tensor
    value: Tensor
    query: tuple[Tensor, ...]
    planes: Planes
    moment: Tensor | None
    query_energy: Tensor
    query_metric: Tensor
    output_metric: Tensor
    key_unpredicted: Tensor
    value_unpredicted: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Weighted energy [M] of the members' keys or values, and the part that merging loses."""

    total: Tensor
    lost: Tensor

    @property
    def share(self) -> float:
        """Lost share of all, 0 where there is nothing to lose."""
        total = float(self.total.sum())
        return max(0.0, float(self.lost.sum())) / total if total > 0 else 0.0

    @property
    def shares(self) -> list[float]:
        """Lost share of each member."""
        return [
            max(0.0, lost) / total if total > 0 else 0.0
            for lost, total in zip(self.lost.tolist(), self.total.tolist(), strict=True)
        ]

    def of_layers(self, layers: int) -> list[Loss]:
        """The same, layer by layer."""
        parts = zip(self.total.chunk(layers), self.lost.chunk(layers), strict=True)
        return [Loss(total, lost) for total, lost in parts]


def moments_of(layers: Sequence[AttentionLayer], inputs: Inputs | None = None) -> Moments:
    """Collect weights and metrics of a unit.

    Args:
        layers: All of q, k, v, o and ``rope`` present; without query/key norms. The first one
            produces what all of them read.
        inputs: Second moments; None takes all inputs as equal and white.
    """
    first = layers[0]
    assert first.rope is not None
    planes = planes_of(first.rope, first.geometry.head_dim)
    queries = tuple(augmented(layer, "q") for layer in layers)
    energies, metrics = zip(
        *(
            _query_moments(query, layer.geometry, planes, _moment(inputs, index))
            for index, (layer, query) in enumerate(zip(layers, queries, strict=True))
        ),
        strict=True,
    )
    energy, metric = torch.cat(energies), torch.cat(metrics)
    outputs = torch.cat([_output_metric(layer) for layer in layers])

    def key_energy(rows: Tensor, moment: Tensor, members: slice) -> Tensor:
        turning, rest = split(rows, planes)
        still = (metric[members] * covariance(rest, moment)).sum((1, 2))
        return (powers(turning, moment) * energy[members]).sum(1) + still

    def value_energy(rows: Tensor, moment: Tensor, members: slice) -> Tensor:
        return (outputs[members] * covariance(rows, moment)).sum((1, 2))

    key, key_missing = _predicted(layers, "k", inputs, key_energy)
    value, value_missing = _predicted(layers, "v", inputs, value_energy)
    return Moments(
        geometry=first.geometry,
        key=key,
        value=value,
        query=queries,
        planes=planes,
        moment=_moment(inputs, 0),
        query_energy=energy,
        query_metric=metric,
        output_metric=outputs,
        key_unpredicted=key_missing,
        value_unpredicted=value_missing,
    )


def merge_heads(
    layers: Sequence[AttentionLayer], groups: Groups, inputs: Inputs | None = None
) -> tuple[list[AttentionLayer], Mapping[str, Loss]]:
    """Replace each group of KV heads by the one that serves its queries and outputs best.

    Args:
        layers: A unit of layers with q, k, v, o and ``rope``; the first one produces.
        groups: Members of every new KV head, ``layer * Hkv + head``; a partition into groups that
            have equally many members of every layer. Query heads and output columns are reordered
            so that the groups of a layer are adjacent.
        inputs: Second moments of the layers' inputs; None for equal, white inputs.

    Returns:
        The layers with ``len(groups)`` KV heads, in the dtypes they had, without keys and values
        of their own from the second on; and what the members' keys (``k``) and values (``v``)
        lost, in the weighted energy that was minimised.
    """
    facts = moments_of(layers, inputs)
    turning, rest = split(facts.key, facts.planes)
    queries = [split(query, facts.planes) for query in facts.query]
    keys = []
    loss = _nothing(facts.key_unpredicted)
    heads = facts.geometry.kv_heads
    for group in groups:
        members = list(group)
        key = merge_complex(turning[members], facts.query_energy[members], facts.moment)
        still = merge_real(rest[members], facts.query_metric[members], facts.moment)
        keys.append(join(key.rows[None], still.rows[None], facts.planes)[0])
        _add(loss, members, key.total + still.total, key.lost + still.lost)
        for place, member in enumerate(members):
            query_turning, query_rest = queries[member // heads]
            for head in _readers(member % heads, facts.geometry):
                query_turning[head] *= key.maps[place].conj()[:, None]
                query_rest[head] = still.maps[place].mT @ query_rest[head]
    valued, value_loss = merge_values(layers, groups, inputs)
    merged = []
    for index, layer in enumerate(valued):
        assert layer.o is not None
        order = query_order(groups, index, facts.geometry)
        query = join(*queries[index], facts.planes)[order]
        fields = _rows(layer, q=query) | (
            _rows(layers[0], k=torch.stack(keys)) if not index else {}
        )
        merged.append(dataclasses.replace(layer, o=layer.o[:, order], **fields))
    return merged, {"k": loss, "v": value_loss}


def merge_values(
    layers: Sequence[AttentionLayer], groups: Groups, inputs: Inputs | None = None
) -> tuple[list[AttentionLayer], Loss]:
    """The part of ``merge_heads`` that keys with a norm of their own leave possible.

    A norm between projection and score does not commute with mixing heads, so keys are left to
    the caller; values have no norm and are merged as always.

    Args:
        layers: A unit of layers with v and o; the first one produces.
        groups: As in ``merge_heads``; output columns stay in their order.
        inputs: Second moments of the layers' inputs; None for equal, white inputs.

    Returns:
        The layers with ``len(groups)`` KV heads and values in the first alone; keys are the
        first's own, still as many as they were. And the loss.
    """
    geometry = layers[0].geometry
    metric = torch.cat([_output_metric(layer) for layer in layers])

    def energy(rows: Tensor, moment: Tensor, members: slice) -> Tensor:
        return (metric[members] * covariance(rows, moment)).sum((1, 2))

    value, missing = _predicted(layers, "v", inputs, energy)
    moment = _moment(inputs, 0)
    values = []
    loss = _nothing(missing)
    outputs = [_double(layer.o).clone() for layer in layers]
    for group in groups:
        members = list(group)
        merged = merge_real(value[members], metric[members], moment)
        values.append(merged.rows)
        _add(loss, members, merged.total, merged.lost)
        for place, member in enumerate(members):
            output = outputs[member // geometry.kv_heads]
            for head in _readers(member % geometry.kv_heads, geometry):
                output[:, head] = output[:, head] @ merged.maps[place]
    return [
        _shared(layer, len(groups), o=output, values=None if index else torch.stack(values))
        for index, (layer, output) in enumerate(zip(layers, outputs, strict=True))
    ], loss


def query_order(groups: Groups, layer: int, geometry: Geometry) -> list[int]:
    """Query heads of a layer in the order of the groups that they read."""
    heads = geometry.kv_heads
    return [
        head
        for group in groups
        for member in group
        if member // heads == layer
        for head in _readers(member % heads, geometry)
    ]


def _readers(kv_head: int, geometry: Geometry) -> range:
    return range(kv_head * geometry.group, (kv_head + 1) * geometry.group)


def _predicted(
    layers: Sequence[AttentionLayer], part: str, inputs: Inputs | None, energy: Any
) -> tuple[Tensor, Tensor]:
    """Rows [M, D, E'] on the first layer's input, and the energy [M] that they cannot give.

    A projection without bias is predicted without a constant, so that the result has none either.
    """
    rows, missing = [], []
    for index, layer in enumerate(layers):
        own = augmented(layer, part)
        members = slice(index * len(own), (index + 1) * len(own))
        if index and inputs is not None:
            used = own.shape[-1] - (getattr(layer, f"{part}_bias") is None)
            fit = own.new_zeros(own.shape[-1], own.shape[-1])
            fit[:used, :used] = prediction(inputs, index, used)
            error = inputs.own[index] - fit @ inputs.own[0] @ fit.mT
            missing.append(energy(own, error, members))
            own = own @ fit
        else:
            missing.append(own.new_zeros(len(own)))
        rows.append(own)
    return torch.cat(rows), torch.cat(missing)


def _moment(inputs: Inputs | None, layer: int) -> Tensor | None:
    return None if inputs is None else inputs.own[layer]


def prediction(inputs: Inputs, layer: int, used: int) -> Tensor:
    """Matrix that predicts the first ``used`` inputs of a layer from those of the first layer.

    Args:
        inputs: Second moments of the layers of a unit.
        layer: Which one of them.
        used: Dims of the inputs [x; 1], with or without the 1.
    """
    moment = inputs.own[0][:used, :used]
    ridge = _RIDGE * moment.diagonal().mean() * torch.eye(used, dtype=moment.dtype)
    cross = inputs.cross[layer][:used, :used]
    solution: Tensor = torch.linalg.solve(moment + ridge, cross.mT)
    return solution.mT


def _query_moments(
    query: Tensor, geometry: Geometry, planes: Planes, moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Energy [Hkv, P] and second moment [Hkv, N, N] of the queries of each KV head."""
    turning, rest = split(query, planes)
    energy, metric = powers(turning, moment), covariance(rest, moment)
    members = (geometry.kv_heads, geometry.group)
    return (
        energy.reshape(*members, -1).sum(1),
        metric.reshape(*members, *metric.shape[1:]).sum(1),
    )


def _output_metric(layer: AttentionLayer) -> Tensor:
    output = _double(layer.o)
    gram = torch.einsum("ehd,ehf->hdf", output, output)
    members = (layer.geometry.kv_heads, layer.geometry.group)
    return gram.reshape(*members, *gram.shape[1:]).sum(1)


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()


def augmented(layer: AttentionLayer, part: str) -> Tensor:
    """Weight [n, D, E] and bias [n, D] of a projection as rows [n, D, E + 1] in float64."""
    weight, bias = _double(getattr(layer, part)), getattr(layer, f"{part}_bias")
    column = weight.new_zeros(weight.shape[:2]) if bias is None else bias.double()
    return torch.cat([weight, column[..., None]], -1)


def _rows(layer: AttentionLayer, **heads: Tensor) -> dict[str, Any]:
    """Rows back into weights and biases; a bias that was absent stays absent, being zero."""
    fields: dict[str, Any] = {}
    for part, rows in heads.items():
        weight, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
        fields[part] = rows[..., :-1].to(weight.dtype)
        fields[f"{part}_bias"] = None if bias is None else rows[..., -1].to(bias.dtype)
    return fields


def _shared(
    layer: AttentionLayer, kv_heads: int, *, o: Tensor, values: Tensor | None
) -> AttentionLayer:
    """The layer with a new output; with new values, or without keys and values of its own."""
    assert layer.o is not None
    own: dict[str, Any] = (
        dict.fromkeys(("k", "v", "k_bias", "v_bias", "k_norm", "k_norm_bias"))
        if values is None
        else _rows(layer, v=values)
    )
    return dataclasses.replace(
        layer,
        geometry=dataclasses.replace(layer.geometry, kv_heads=kv_heads),
        o=o.to(layer.o.dtype),
        **own,
    )


def _nothing(unpredicted: Tensor) -> Loss:
    return Loss(unpredicted.clone(), unpredicted.clone())


def _add(loss: Loss, members: list[int], total: Tensor, lost: Tensor) -> None:
    loss.total[members] += total
    loss.lost[members] += lost

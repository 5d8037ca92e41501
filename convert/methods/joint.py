"""Layers that share one latent, seen as one layer with the heads of all of them.

The first layer of a unit makes the latent and the rotary key, and the others read them with queries
and up-projections of their own. So the keys and values of the others are first replaced by their
best prediction from the first one's input, which the second moments of the inputs determine. After
that all keys of a unit are linear in one input, and mixing, cut and factorisation treat them as the
heads of one layer. A unit of one layer is that layer, unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attended import Attended
from convert.methods.fitting import Observed
from convert.methods.halves import covariance
from convert.methods.latent import Factored, factored, value_gram
from convert.methods.merge import Inputs, augmented, prediction
from convert.methods.mixing import Mixed, Mixture, Rows, mixture, query_energy, rows_of
from convert.methods.normed import factored_whole, mean_factors

__all__ = [
    "Joint",
    "complete",
    "factored_jointly",
    "joint",
    "lost_in_latent",
    "lost_with_turn",
    "parts_of",
    "reader",
    "shares_of",
    "stacked",
    "together",
    "unpredicted",
    "white",
]


@dataclass(frozen=True, slots=True)
class Joint:
    """A unit of layers, as one.

    Args:
        layers: The originals.
        layer: All of them as one layer: the heads of the first, of the second, and so on. Its keys
            and values read the first one's input, and query heads each the input of their own.
        rows: Of ``layer``.
        mixture: How its keys become components.
        mixed: Its keys as components.
        moment: [E', E'] second moment of the first one's input.
        factors: [H] mean square of what norms multiply scores by; None if there are none.
    """

    layers: tuple[AttentionLayer, ...]
    layer: AttentionLayer
    rows: Rows
    mixture: Mixture
    mixed: Mixed
    moment: Tensor
    factors: Tensor | None

    def member(self, place: int) -> AttentionLayer:
        """One of the layers, with keys and values that read the first one's input."""
        layer, read = self.layers[place], self.layer
        if read is layer:
            return layer
        part = partial(self._part, place=place)
        return dataclasses.replace(
            layer,
            k=part(_present(read.k)),
            v=part(_present(read.v)),
            k_bias=None if read.k_bias is None else part(read.k_bias),
            v_bias=None if read.v_bias is None else part(read.v_bias),
        )

    def rows_of(self, place: int) -> Rows:
        """The rows of one of the layers."""
        q, k, v = (self._part(heads, place) for heads in (self.rows.q, self.rows.k, self.rows.v))
        return dataclasses.replace(self.rows, q=q, k=k, v=v)

    def mixed_for(self, place: int) -> Mixed:
        """The components, as the keys of one of the layers are made of them."""
        return dataclasses.replace(self.mixed, maps=self._part(self.mixed.maps, place))

    def _part(self, heads: Tensor, place: int) -> Tensor:
        return heads.chunk(len(self.layers))[place]


def white(hidden: int) -> Tensor:
    """[E', E'] the second moment that is assumed where no text is at hand."""
    return torch.eye(hidden + 1, dtype=torch.float64)


def joint(
    layers: Sequence[AttentionLayer],
    inputs: Inputs | None,
    shares: Sequence[float],
    norm: QkNorm | None = None,
    *,
    found: Mixture | None = None,
) -> Joint:
    """A unit of layers as one.

    Args:
        layers: With q, k, v, o and ``rope``; the first one produces.
        inputs: Second moments of their inputs; None takes them as equal and white.
        shares: How much the scores of each layer count beside those of the others.
        norm: Of queries and keys; only one layer alone can have it.
        found: How their keys become components, if that was found before.
    """
    layer = stacked(layers, inputs)
    rows = rows_of(layer, norm)
    moment = white(layer.geometry.hidden)
    moments = [moment] * len(layers) if inputs is None else list(inputs.own)
    factors = None if norm is None else mean_factors(layer, norm, moments[0])
    if found is None:
        weights = _read_energy(rows, moments, shares)
        weights = weights if factors is None else weights * factors[:, None]
        members = weights.reshape(layer.geometry.kv_heads, layer.geometry.group, -1).sum(1)
        found = mixture(rows, moments[0], members)
    return Joint(tuple(layers), layer, rows, found, found.of(rows), moments[0], factors)


def _read_energy(rows: Rows, moments: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """[H, P] energy of the queries of all layers, each with its share and its own input."""
    parts = zip(rows.q.chunk(len(moments)), moments, shares, strict=True)
    return torch.cat(
        [
            share * query_energy(dataclasses.replace(rows, q=own), moment)
            for own, moment, share in parts
        ]
    )


def stacked(layers: Sequence[AttentionLayer], inputs: Inputs | None) -> AttentionLayer:
    """Several layers as one; see ``Joint.layer``.

    Predictions have a constant, so keys and values of a calibrated unit have biases.
    """
    first, count = layers[0], len(layers)
    if count == 1:
        return first
    fields: dict[str, Any] = {
        "o": torch.cat([_present(layer.o) for layer in layers], 1),
        "o_bias": None,  # each layer keeps its own
    }
    for part in ("q", "k", "v"):
        rows = [augmented(layer, part) for layer in layers]
        biased = getattr(first, f"{part}_bias") is not None
        if part != "q" and inputs is not None:
            width = rows[0].shape[-1]
            rows[1:] = [rows[i] @ prediction(inputs, i, width) for i in range(1, count)]
            biased = True
        heads = torch.cat(rows)
        fields |= {part: heads[..., :-1], f"{part}_bias": heads[..., -1] if biased else None}
    sizes = first.geometry
    geometry = dataclasses.replace(
        sizes, heads=count * sizes.heads, kv_heads=count * sizes.kv_heads
    )
    return dataclasses.replace(first, geometry=geometry, **fields)


def shares_of(observed: Sequence[Observed]) -> list[float]:
    """How much the scores of the layers of a unit count beside one another."""
    return [1.0] if len(observed) == 1 else [seen.share for seen in observed]


def together(
    parts: Sequence[Attended], scales: Sequence[float], weights: Sequence[float]
) -> Attended:
    """What attention makes of the keys of a unit, with the factor on scores in all energies.

    Outputs of different layers meet in the residual stream with other layers between them, so
    their errors are taken as independent.

    Args:
        parts: Of each layer.
        scales: Factor on the scores of each layer.
        weights: What an error of the output of each layer counts.
    """
    counts = [weight * scale**2 for scale, weight in zip(scales, weights, strict=True)]
    pairs = list(zip(parts, counts, strict=True))
    values = [weight * part.values for part, weight in zip(parts, weights, strict=True)]
    return Attended(
        energy=torch.cat([count * part.energy for part, count in pairs]),
        turn=torch.cat([part.turn for part in parts]),
        queries=torch.cat([count * part.queries for part, count in pairs]),
        values=torch.block_diag(*values),  # type: ignore[no-untyped-call]
    )


def factored_jointly(
    unit: Joint, attended: Attended, keys: Tensor, rank: int, *, centred: bool
) -> Factored:
    """The latent that keeps the most of the keys and values of a unit.

    Args:
        unit: The layers.
        attended: What attention makes of their keys.
        keys: [H, D, E'] without rotation, of all heads.
        rank: R.
        centred: Leave constants out of the latent, unless a norm makes those of keys count.
    """
    factor = partial(factored, centred=centred) if unit.factors is None else factored_whole
    return factor(
        keys,
        unit.rows.v,
        key_metric=attended.queries,
        value_gram=value_gram(unit.layer, attended.values),
        moment=unit.moment,
        rank=rank,
    )


def parts_of(factors: Factored, count: int) -> list[Factored]:
    """A factorisation of a unit, as each of its layers reads it."""
    parts = [getattr(factors, name).chunk(count) for name in ("k_up", "v_up", "v_constant")]
    return [
        dataclasses.replace(factors, k_up=k_up, v_up=v_up, v_constant=constant)
        for k_up, v_up, constant in zip(*parts, strict=True)
    ]


def lost_with_turn(attended: Attended, kept: Tensor, count: int) -> list[float]:
    """Share of the energy of each layer's keys that is lost with their rotation.

    Args:
        attended: What attention makes of the keys of a unit.
        kept: [P, n] true where a component stays rotary.
        count: Layers of the unit.
    """
    lost = attended.energy * (1 - attended.turn.abs().square()).clamp(min=0)
    parts = zip(lost.chunk(count), attended.energy.chunk(count), strict=True)
    return [_share(part[:, ~kept], whole) for part, whole in parts]


def lost_in_latent(
    unit: Joint, attended: Attended, keys: Tensor, factors: Factored, *, centred: bool
) -> list[float]:
    """Share of what the latent should hold for each layer that it leaves out.

    Args:
        unit: The layers.
        attended: What attention makes of their keys.
        keys: [H, D, E'] without rotation, of all heads.
        factors: The latent, white on the inputs, and its maps.
        centred: Whether constants are left out of it.
    """
    if len(unit.layers) == 1:
        return [factors.lost / factors.energy if factors.energy > 0 else 0.0]
    count, used = len(unit.layers), factors.latent.shape[1]  # with norms it reads the constant too
    moment = unit.moment[:used, :used]
    if centred and used < len(unit.moment):
        mean = unit.moment[:used, -1:]
        moment = moment - mean * mean.mT
    gram, identity = value_gram(unit.layer, attended.values), torch.eye(len(factors.latent))
    width, found = len(gram) // count, []
    wholes = [(keys[..., :used], unit.rows.v[..., :used], moment)]
    wholes += [(factors.k_up, factors.v_up, identity.to(moment))]
    for place in range(count):
        block = slice(place * width, (place + 1) * width)
        metric = attended.queries.chunk(count)[place]
        total, kept = (
            _energy(key.chunk(count)[place], metric, white)
            + _energy(value.flatten(0, 1)[None, block], gram[None, block, block], white)
            for key, value, white in wholes
        )
        found.append(_share(total - kept, total))
    return found


def unpredicted(unit: Joint, attended: Attended, inputs: Inputs | None) -> list[float]:
    """Share of the energy of each layer's keys and values that the first one's input cannot give.

    Args:
        unit: The layers.
        attended: What attention makes of their keys.
        inputs: Second moments of their inputs; None where they are taken as equal.
    """
    if inputs is None or len(unit.layers) == 1:
        return [0.0] * len(unit.layers)
    count, found = len(unit.layers), [0.0]
    gram = value_gram(unit.layer, attended.values)
    width = len(gram) // count
    for place in range(1, count):
        own = rows_of(unit.layers[place])
        fit = prediction(inputs, place, own.k.shape[-1])
        whole = inputs.own[place]
        crossed = fit @ inputs.cross[place].mT
        error = whole - crossed - crossed.mT + fit @ inputs.own[0] @ fit.mT
        metric = attended.queries.chunk(count)[place]
        block = slice(place * width, (place + 1) * width)
        keys = own.k.repeat_interleave(len(metric) // len(own.k), 0)
        lost, total = (
            _energy(keys, metric, moment)
            + _energy(own.v.flatten(0, 1)[None], gram[None, block, block], moment)
            for moment in (error, whole - whole[:, -1:] * whole[-1:])
        )
        found.append(_share(lost, total))
    return found


def complete(layer: LatentLayer, producer: LatentLayer) -> LatentLayer:
    """A reader with the latent and the rotary key that it reads."""
    return dataclasses.replace(
        layer, latent=producer.latent, k_rope=producer.k_rope, k_rope_bias=producer.k_rope_bias
    )


def reader(layer: LatentLayer) -> LatentLayer:
    """A layer without the latent and the rotary key that another makes."""
    return dataclasses.replace(
        layer, latent=layer.latent[:0], k_rope=layer.k_rope[:0], k_rope_bias=None
    )


def _energy(rows: Tensor, metric: Tensor, moment: Tensor) -> Tensor:
    """``sum_h tr(metric_h K_h moment K_h^T)`` of rows [h, D, E'] and metrics [h, D, D]."""
    return (metric * covariance(rows, moment)).sum()


def _share(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return max(0.0, float(part.sum())) / total if total > 0 else 0.0


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()

"""Refitting one layer of a unit, given what the original layers did on the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.attention import (
    Scoring,
    attend,
    keys,
    logits,
    queries,
    values,
    weights,
)
from convert.methods.halves import gram
from convert.methods.least_squares import Tick, no_tick
from convert.methods.merge import Inputs
from convert.methods.refit_outcome import ValueReader, refit_output, refit_values
from convert.methods.refit_scores import (
    STEPS,
    Basis,
    Reader,
    basis_of,
    refit_queries,
    refit_scores,
)

__all__ = [
    "Observed",
    "Shared",
    "head_outputs",
    "projected",
    "refit_outcome",
    "refit_projections",
    "row_divergence",
    "second_moments",
    "steps_of_fits",
]

_FAINT = 1e-3  # of the power of the strongest outcome in a unit
_EVERY = 4  # one window of so many is compared

Each = Callable[[Callable[[int], None], range], object]
Shared = tuple[Tensor, Tensor]  # rotated keys [N, Hkv, T, D] and values [N, Hkv, T, Dv]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """An original layer and what it did.

    Args:
        layer: float32, heads in plane order.
        scoring: How its scores become weights.
        query_order: Its query heads in the order in which the converted layer has them.
        before: [N, T, E] residual stream that came in.
        inputs: [N, T, E] input of its attention.
        outputs: [N, T, E] what its output projection gave.
    """

    layer: AttentionLayer
    scoring: Scoring
    query_order: tuple[int, ...]
    before: Tensor
    inputs: Tensor
    outputs: Tensor

    @property
    def share(self) -> float:
        """Power of the attention's outcome, of that of the residual stream that it joins."""
        stream = self.before + self.outputs
        return float(self.outputs.square().mean() / stream.square().mean())

    def scores(self, heads: Sequence[int]) -> Tensor:
        """Scores [N, h, T, T] of some of its query heads, before cap, offset and mask."""
        layer = self.layer
        assert layer.q is not None
        assert layer.k is not None
        chosen, read = list(heads), [head // layer.geometry.group for head in heads]
        if self.scoring.norm is not None:  # it may take the heads together
            query = queries(layer, self.scoring, self.inputs)[:, chosen]
            key = keys(layer, self.scoring, self.inputs)[:, read]
            return logits(query, key, self.scoring)
        part = dataclasses.replace(
            layer,
            q=layer.q[chosen],
            q_bias=None if layer.q_bias is None else layer.q_bias[chosen],
            k=layer.k[read],
            k_bias=None if layer.k_bias is None else layer.k_bias[read],
        )
        query = queries(part, self.scoring, self.inputs)
        return logits(query, keys(part, self.scoring, self.inputs), self.scoring)


def second_moments(inputs: Sequence[Tensor]) -> Inputs:
    """Second moments of the attention inputs [N, T, E] of the layers of a unit."""
    size = inputs[0].shape[-1] + 1
    own = [torch.zeros(size, size, dtype=torch.float64) for _ in inputs]
    cross = [own[0], *(torch.zeros_like(own[0]) for _ in inputs[1:])]
    for windows in zip(*inputs, strict=True):
        rows = [_augmented(window) for window in windows]
        for place, row in enumerate(rows):
            own[place] += gram(row).cpu()
            if place:
                cross[place] += (row.mT @ rows[0]).cpu()
    count = inputs[0][..., 0].numel()
    return Inputs(tuple(m / count for m in own), tuple(m / count for m in cross))


def refit_projections(
    place: int,
    observed: Sequence[Observed],
    converted: Sequence[AttentionLayer],
    inputs: Tensor,
    shared: Shared | None,
    *,
    each: Each,
    seed: int,
    tick: Tick = no_tick,
) -> list[AttentionLayer]:
    """Refit the query projections of a layer, and its key projection if it produces keys.

    A producer's keys serve all layers of the unit: those that come later take part with the inputs
    they had in the original model.

    Args:
        place: Which layer of the unit.
        observed: The unit's original layers, without query/key norms and clamps.
        converted: The unit's converted layers, float32, heads in plane order.
        inputs: [N, T, E] input of this layer's attention in the converted model.
        shared: Keys and values of the producer; None if this layer is the producer.
        each: Calls a function for each KV head, in any order or at the same time.
        seed: Of the fits.
        tick: Called after each step of a fit, see ``steps_of_fits``; in any thread.

    Returns:
        The converted layers with their new projections.
    """
    produces = shared is None
    layer = converted[place]
    places = range(place, len(observed)) if produces else range(place, place + 1)
    bases = {
        at: basis_of(
            inputs if at == place else observed[at].inputs, bias=converted[at].q_bias is not None
        )
        for at in places
    }
    rows = {at: _rows(converted[at], "q") for at in places}
    if produces:
        biased = layer.k_bias is not None
        same = biased == (layer.q_bias is not None)
        basis = bases[place] if same else basis_of(inputs, bias=biased)
        key_rows = _rows(layer, "k")
    group = layer.geometry.group

    def refit(slot: int) -> None:
        heads = slice(slot * group, (slot + 1) * group)
        readers = [
            Reader(
                bases[at],
                rows[at][heads],
                observed[at].scores(observed[at].query_order[heads]),
                _for_heads(observed[at].scoring, observed[at].query_order[heads]),
                observed[at].share,
                tick=tick,
            )
            for at in places
        ]
        if shared is None:
            key_rows[slot] = refit_scores(readers, basis, key_rows[slot], seed=seed)
        else:
            refit_queries(readers, shared[0][:, slot], seed=seed)
        for at, reader in zip(places, readers, strict=True):
            rows[at][heads] = reader.rows

    each(refit, range(layer.geometry.kv_heads))
    fitted = list(converted)
    for at in places:
        fitted[at] = _with_rows(fitted[at], "q", rows[at])
    if produces:
        fitted[place] = _with_rows(fitted[place], "k", key_rows)
    return fitted


def steps_of_fits(place: int, unit: int, kv_heads: int) -> int:
    """How often ``refit_projections`` calls ``tick`` for a layer of a unit of so many layers."""
    fits = 1 if place else 2 * unit + 1  # maps and queries of all, and keys
    return fits * kv_heads * STEPS


def refit_outcome(
    place: int,
    observed: Sequence[Observed],
    converted: Sequence[AttentionLayer],
    *,
    asked: Tensor,
    inputs: Tensor,
    shared: Shared,
    target: Tensor,
    basis: Basis | None = None,
    read: Tensor | None = None,
) -> list[AttentionLayer]:
    """Refit the output projection of a layer, and its value projection if it produces values.

    Values are refitted once, between two refits of the output: measured, more rounds gain nothing.
    As with keys, the layers of the unit that come later take part in the fit of the values with
    what they did in the original model.

    Args:
        place: Which layer of the unit.
        observed: The unit's original layers.
        converted: The unit's converted layers, float32, heads in plane order.
        asked: [N, H, T, D] rotated queries of this layer in the converted model.
        inputs: [N, T, E] input of its attention there.
        shared: Keys and values of the producer.
        target: [N, T, E] what this layer's attention should give.
        basis: What the values are made of; None for the inputs.
        read: [N, T, E] input that the values read; None for ``inputs``.

    Returns:
        The converted layers with their new projections.
    """
    produces = place == 0
    parts = []
    for at in range(place, len(observed) if produces else place + 1):
        layer, seen = converted[at], observed[at]
        own, wanted = asked, target
        if at != place:
            own, wanted = queries(layer, seen.scoring, seen.inputs), seen.outputs
        heads = head_outputs(own, seen.scoring, shared)
        parts.append(_Outcome(layer, seen.scoring, own, wanted, heads))
    for part in parts:
        part.refit_output()
    if produces:
        if basis is None:
            basis = basis_of(inputs, bias=converted[0].v_bias is not None)
        _refit_all_values(parts, shared[0], basis)
        value = values(parts[0].layer, parts[0].scoring, inputs if read is None else read)
        for part in parts:
            part.heads = head_outputs(part.asked, part.scoring, (shared[0], value))
            part.refit_output()
    fitted = list(converted)
    fitted[place : place + len(parts)] = [part.layer for part in parts]
    return fitted


@dataclass(slots=True)
class _Outcome:
    """A layer whose outcome is refitted.

    Args:
        layer: Its values and its output are refitted.
        scoring: How its scores become weights.
        asked: [N, H, T, D] its rotated queries.
        target: [N, T, E] what it should give.
        heads: [N, T, H, Dv] what its heads give.
    """

    layer: AttentionLayer
    scoring: Scoring
    asked: Tensor
    target: Tensor
    heads: Tensor

    def refit_output(self) -> None:
        """Refit the output projection."""
        output, bias = self.layer.o, self.layer.o_bias
        assert output is not None
        output, bias = refit_output(self.heads, self.target, output, bias)
        self.layer = dataclasses.replace(self.layer, o=output, o_bias=bias)

    def output(self, heads: range) -> Tensor:
        """[E, g, Dv] of some of its heads."""
        assert self.layer.o is not None
        return self.layer.o[:, heads.start : heads.stop]

    def weights(self, heads: range, key: Tensor) -> Tensor:
        """Attention weights [N, g, T, T] of some of its heads, for keys [N, 1, T, D]."""
        scores = logits(self.asked[:, heads.start : heads.stop], key, self.scoring)
        return weights(scores, _for_heads(self.scoring, heads))


def _refit_all_values(parts: Sequence[_Outcome], key: Tensor, basis: Basis) -> None:
    """Refit the value projection of a producer for all layers, one KV head after the other.

    Args:
        parts: The producer and those that read its keys [N, Hkv, T, D] and values.
        key: Those keys.
        basis: What the values are made of.
    """
    producer = parts[0].layer
    rows = _rows(producer, "v")
    group = producer.geometry.group
    # each layer counts by the share of its outcome that it loses, unless that is next to nothing
    powers = torch.stack([part.target.square().mean() for part in parts])
    floor = _FAINT * powers.max() if powers.any() else 1.0
    scales = powers.clamp(min=floor).rsqrt()
    # what the outcome lacks beside what all heads give as they stand
    missing = [
        scale * (part.target - projected(part.layer, part.heads))
        for part, scale in zip(parts, scales, strict=True)
    ]
    for slot in range(producer.geometry.kv_heads):
        heads = range(slot * group, (slot + 1) * group)
        readers = [
            ValueReader(
                part.weights(heads, key[:, slot : slot + 1]),
                scale * part.output(heads),
                lacking,
            )
            for part, scale, lacking in zip(parts, scales, missing, strict=True)
        ]
        change = refit_values(readers, basis.white)
        rows[slot] += change @ basis.back
        value = basis.white @ change.mT
        for reader in readers:
            added = (reader.weights @ value[:, None]).transpose(1, 2)
            reader.missing.sub_(added.flatten(2) @ reader.output.flatten(1).mT)
    parts[0].layer = _with_rows(producer, "v", rows)


def head_outputs(asked: Tensor, scoring: Scoring, shared: Shared) -> Tensor:
    """Head outputs [N, T, H, Dv] for rotated queries [N, H, T, D], one window at a time."""
    return torch.cat(
        [
            attend(query[None], key[None], value[None], scoring)
            for query, key, value in zip(asked, *shared, strict=True)
        ]
    )


def projected(layer: AttentionLayer, heads: Tensor) -> Tensor:
    """Output [N, T, E] of a layer for its head outputs."""
    assert layer.o is not None
    output = heads.flatten(2) @ layer.o.flatten(1).mT
    return output if layer.o_bias is None else output + layer.o_bias


def row_divergence(observed: Observed, asked: Tensor, scoring: Scoring, shared: Shared) -> float:
    """Mean KL divergence, in nats, of the converted attention rows from the original ones.

    One window of four says as much, since rows differ more than windows do.

    Args:
        observed: The original layer.
        asked: [N, H, T, D] rotated queries of the converted layer.
        scoring: Of the converted layer.
        shared: Its keys and values.
    """
    total = 0.0
    order = observed.query_order
    windows = range(0, len(asked), _EVERY)
    for window in windows:
        one = slice(window, window + 1)
        part = dataclasses.replace(observed, inputs=observed.inputs[one])
        truth = weights(part.scores(order), _for_heads(observed.scoring, order))
        found = weights(logits(asked[one], shared[0][one], scoring), scoring)
        ratio = torch.where(truth > 0, truth * (truth / found.clamp(min=1e-30)).log(), 0.0)
        total += float(ratio.sum(-1).mean())
    return max(0.0, total / len(windows))  # rounding can give less than nothing


def _augmented(window: Tensor) -> Tensor:
    rows = window.double()
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _for_heads(scoring: Scoring, heads: Sequence[int]) -> Scoring:
    """The scoring of some query heads of a layer."""
    if scoring.offset is None:
        return scoring
    return dataclasses.replace(scoring, offset=scoring.offset[list(heads)])


def _rows(layer: AttentionLayer, part: str) -> Tensor:
    """A projection [n, D, E'] with its bias, if it has one."""
    weight, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
    return weight.clone() if bias is None else torch.cat([weight, bias[..., None]], -1)


def _with_rows(layer: AttentionLayer, part: str, rows: Tensor) -> AttentionLayer:
    fields: dict[str, Any] = {part: rows}
    if getattr(layer, f"{part}_bias") is not None:
        fields = {part: rows[..., :-1], f"{part}_bias": rows[..., -1]}
    return dataclasses.replace(layer, **fields)

"""Refitting the scores of a latent layer: its queries, its rotary key, how keys read the latent.

All are least squares problems in the metric of ``refit_scores``, solved in turn. Each head on its
own has two: its query projection, of which first a map is fitted and last the full width, and its
map from the latent to a key. The rotary key is one problem for all heads. The latent stands, since
the values are made of it too.

Where queries and keys have a norm, scores are linear in a map of the normed query, which takes the
place of the query projection; its dims without rotation end up in the map from the latent. The keys
of a token are then multiplied by its factor, which does not depend on what is fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import AttentionLayer, Geometry, LatentLayer, Rope
from convert.methods.attention import (
    Scoring,
    key_factors,
    keys,
    logits,
    project,
    projected_queries,
    queries,
    rotate,
)
from convert.methods.fitting import Each, Observed, Shared
from convert.methods.halves import gram
from convert.methods.least_squares import RIDGE, solve, total
from convert.methods.refit_scores import STEPS, Basis, Reader, Ruler, basis_of

__all__ = [
    "Reading",
    "expanded",
    "latent_basis",
    "refit_latent_scores",
    "shared_by",
    "with_expanded_values",
]


def expanded(layer: LatentLayer) -> AttentionLayer:
    """A latent layer as attention with a KV head for each query head, rotary dims first.

    So it computes with ``attention`` like any other layer, in plane order; but if it has norms, its
    keys want their factor, see ``shared_by``.
    """
    sizes, heads = layer.geometry, layer.geometry.heads
    key = torch.cat([layer.k_rope.expand(heads, -1, -1), layer.k_up @ layer.latent], 1)
    key_bias = value_bias = q_map = None
    if layer.k_rope_bias is not None:
        rest = layer.k_rope_bias.new_zeros(heads, sizes.nope_dim)
        if layer.latent_bias is not None:
            rest = layer.k_up @ layer.latent_bias
        key_bias = torch.cat([layer.k_rope_bias.expand(heads, -1), rest], 1)
    if layer.latent_bias is not None:
        value_bias = layer.v_up @ layer.latent_bias
    q, q_bias = layer.q, layer.q_bias
    if layer.q_rope is None:
        q = _rope_first(q, sizes.nope_dim)
        q_bias = None if q_bias is None else _rope_first(q_bias, sizes.nope_dim)
    else:
        same = torch.eye(sizes.nope_dim, dtype=q.dtype, device=q.device)
        q_map = torch.cat([layer.q_rope, same.expand(heads, -1, -1)], 1)
    return AttentionLayer(
        geometry=Geometry(
            hidden=sizes.hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=sizes.rope_dim + sizes.nope_dim,
            value_dim=sizes.value_dim,
        ),
        q=q,
        k=key,
        v=layer.v_up @ layer.latent,
        o=layer.o,
        q_bias=q_bias,
        k_bias=key_bias,
        v_bias=value_bias,
        o_bias=layer.o_bias,
        q_norm=layer.q_norm,
        q_norm_bias=layer.q_norm_bias,
        q_map=q_map,
        rope=Rope(dim=sizes.rope_dim, interleaved=True, theta=1.0),
    )


def shared_by(layer: LatentLayer, scoring: Scoring, inputs: Tensor) -> Shared:
    """Keys and values of each query head for inputs [N, T, E], with all that scores want of them.

    Args:
        layer: The latent layer.
        scoring: Its scoring.
        inputs: [N, T, E].
    """
    latents, turning = _latents(layer, inputs), inputs @ layer.k_rope.mT
    if layer.k_rope_bias is not None:
        turning = turning + layer.k_rope_bias
    turned = rotate(turning, scoring.turn)[:, None].expand(-1, layer.geometry.heads, -1, -1)
    key = torch.cat([turned, project(layer.k_up, None, latents)], -1)
    factors = _factors(layer, scoring, inputs)
    return key if factors is None else key * factors, project(layer.v_up, None, latents)


def _factors(layer: LatentLayer, scoring: Scoring, inputs: Tensor) -> Tensor | None:
    """What the norm multiplies the keys of each query head by, [N, H, T, 1]; None without one."""
    if layer.k is None or scoring.norm is None:
        return None
    found = key_factors(scoring.norm, scoring.norm_eps, layer.k, layer.k_bias, inputs)
    return found.repeat_interleave(layer.geometry.heads // found.shape[1], 1)[..., None]


def latent_basis(layer: LatentLayer, inputs: Tensor) -> Basis:
    """The latents [N, T, R] of inputs [N, T, E], as what projections are made of."""
    return Basis(inputs, _latents(layer, inputs), _with_bias(layer.latent, layer.latent_bias))


def _latents(layer: LatentLayer, inputs: Tensor) -> Tensor:
    latents = inputs @ layer.latent.mT
    return latents if layer.latent_bias is None else latents + layer.latent_bias


def with_expanded_values(layer: LatentLayer, fitted: AttentionLayer, basis: Basis) -> LatentLayer:
    """The latent layer with the values and the output of its refitted expanded form."""
    assert fitted.v is not None
    assert fitted.o is not None
    # rows of a latent differ in size by orders of magnitude, which this decomposition leaves alone
    unit, root = torch.linalg.qr(basis.back.mT.double())
    there = torch.linalg.solve_triangular(root, unit.mT, upper=True).mT.to(fitted.v.dtype)
    v_up = _with_bias(fitted.v, fitted.v_bias) @ there
    return dataclasses.replace(layer, v_up=v_up, o=fitted.o, o_bias=fitted.o_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A layer that reads a latent and a rotary key, and what it should do.

    Args:
        layer: float32, with the latent and the rotary key that it reads.
        observed: The original layer.
        scoring: That of the latent layer: its turn has the pairs of the rotary key alone.
        inputs: [N, T, E] what its queries are made of.
    """

    layer: LatentLayer
    observed: Observed
    scoring: Scoring
    inputs: Tensor


def refit_latent_scores(
    readings: Sequence[Reading], source: Tensor, *, place: int = 0, each: Each, seed: int
) -> list[LatentLayer]:
    """Refit maps of queries, the rotary key, the maps from the latent to keys, and all of queries.

    The rotary key is refitted with its producer, for all layers that read it; those that come later
    take part with what they did in the original model.

    Args:
        readings: The layers of a unit, the producer first.
        source: [N, T, E] input of the producer's attention in the converted model.
        place: Which layer of the unit.
        each: Calls a function for each head, in any order or at the same time.
        seed: Of the fits.

    Returns:
        The layers, the one at ``place`` with its new projections, all later ones with new queries
        and a new rotary key if it produces.
    """
    produces = place == 0
    fit = _Fit(readings if produces else readings[place : place + 1], source, each=each, seed=seed)
    fit.map_queries()
    if produces and fit.turns:
        fit.rotary_key()
    fit.still_keys_and_queries()
    layers = [reading.layer for reading in readings]
    fitted = fit.layers()
    layers[place : place + len(fitted)] = fitted
    return layers


class _Reader:
    """What is fitted of one layer: rows for each head.

    Without a norm they are the query projection, and with one what comes after it.
    """

    def __init__(self, reading: Reading, source: Tensor, *, share: float, seed: int) -> None:
        layer = reading.layer
        self.reading, self.share, self._seed = reading, share, seed
        # of the original, once for all the times that a head's scores are wanted
        original = reading.observed
        self._original_queries = queries(original.layer, original.scoring, original.inputs)
        self._original_keys = keys(original.layer, original.scoring, original.inputs)
        self.factors = _factors(layer, reading.scoring, source)
        if layer.q_rope is None:
            basis = basis_of(reading.inputs, bias=layer.q_bias is not None)
            self.bases = [basis] * layer.geometry.heads
            self.rows = _rope_first(_with_bias(layer.q, layer.q_bias), layer.geometry.nope_dim)
        else:
            ready = expanded(layer)
            assert ready.q_map is not None
            plain, self.rows = dataclasses.replace(ready, q_map=None), ready.q_map
            normed = projected_queries(plain, reading.scoring, reading.inputs)
            self.bases = [basis_of(heads, bias=False) for heads in normed.unbind(1)]
        pairs = zip(self.rows, self.bases, strict=True)
        self.asked = torch.stack([basis.inputs.flatten(0, 1) @ row.mT for row, basis in pairs])
        self.k_up = layer.k_up.clone()

    def scaled(self, key: Tensor, head: int, window: int | slice = slice(None)) -> Tensor:
        """Keys [N, T, n] of a head, or [T, n] of a window, with their factor."""
        return key if self.factors is None else key * self.factors[window, head]

    def rotary_queries(self, width: int) -> Tensor:
        """Rotated queries [N, H, T, Dr] with their scale."""
        turn = self.reading.scoring.turn
        asked = self.asked[..., :width].reshape(len(self.asked), -1, len(turn), width)
        return rotate(asked.transpose(0, 1), turn) * self.reading.scoring.scale

    def ruler(self, head: int) -> Ruler:
        """The metric of the scores of a head."""
        reading, own = self.reading, slice(head, head + 1)
        group = reading.observed.layer.geometry.group
        asked, read = self._original_queries[:, head, None], self._original_keys[:, head // group]
        target = logits(asked, read[:, None], reading.observed.scoring)
        reader = Reader(
            self.bases[head],
            self.rows[own],
            target,
            reading.scoring,
            self.share,
            self.asked[own],
        )
        return Ruler(reader, self._seed + head)

    def layer(self, k_rope: Tensor, k_bias: Tensor | None) -> LatentLayer:
        """The layer with what was fitted and a rotary key."""
        start = self.reading.layer
        rope, biased = start.geometry.rope_dim, start.q_bias is not None
        layer = dataclasses.replace(start, k_rope=k_rope, k_rope_bias=k_bias)
        if start.q_rope is not None:
            k_up = self.rows[:, rope:].mT @ self.k_up
            return dataclasses.replace(layer, q_rope=self.rows[:, :rope], k_up=k_up)
        q, q_bias = _without_bias(self.rows, biased)
        return dataclasses.replace(
            layer,
            q=_nope_first(q, rope),
            q_bias=None if q_bias is None else _nope_first(q_bias, rope),
            k_up=self.k_up,
        )


class _Fit:
    """The parts of layers with one latent and one rotary key, which are fitted in turn."""

    def __init__(
        self, readings: Sequence[Reading], source: Tensor, *, each: Each, seed: int
    ) -> None:
        first, many = readings[0], len(readings) > 1
        self._each, heads = each, first.layer.geometry.heads
        self._readers = [
            _Reader(
                reading,
                source,
                share=reading.observed.share if many else 1.0,
                seed=seed + place * heads,
            )
            for place, reading in enumerate(readings)
        ]
        layer, basis = first.layer, self._readers[0].bases[0]
        self._scoring = first.scoring
        self._biased = layer.k_rope_bias is not None
        same = source is first.inputs and (layer.q_bias is not None) == self._biased
        same = same and layer.q_rope is None
        self._key_basis = basis if same else basis_of(source, bias=self._biased)
        self._key_rows = _with_bias(layer.k_rope, layer.k_rope_bias)
        latents = source @ layer.latent.mT
        # no softmax sees a constant of keys without rotation and norm, but float32 rounds it
        constant = -latents.mean((0, 1)) if layer.latent_bias is None else layer.latent_bias
        self._latents = latents + constant

    @property
    def turns(self) -> bool:
        """Whether there is a rotary key."""
        return bool(len(self._key_rows))

    def layers(self) -> list[LatentLayer]:
        """The layers with what was fitted."""
        k_rope, k_bias = _without_bias(self._key_rows, self._biased)
        return [reader.layer(k_rope, k_bias) for reader in self._readers]

    def map_queries(self) -> None:
        """Refit a map of the queries of each head of all layers."""
        turned = self._turned()

        def refit(reader: _Reader, head: int) -> None:
            ruler = reader.ruler(head)
            ruler.map_queries(self._key(reader, head, turned))
            reader.rows[head], reader.asked[head] = (
                ruler.reader.rows[0],
                ruler.reader.projected()[0],
            )

        self._each_head(refit, self._readers)

    def still_keys_and_queries(self) -> None:
        """Refit the first layer's maps from the latent to keys, then its query projections."""
        turned = self._turned()

        def refit(reader: _Reader, head: int) -> None:
            ruler = reader.ruler(head)
            reader.k_up[head] = ruler.fit_still_keys(
                reader.scaled(turned, head),
                reader.scaled(self._latents, head),
                reader.k_up[head],
            )
            ruler.fit_queries(self._key(reader, head, turned))
            reader.rows[head] = ruler.reader.rows[0]

        self._each_head(refit, self._readers[:1])

    def rotary_key(self) -> None:
        """Refit the projection of the rotary key for all heads that read it."""
        basis, turn, turned = self._key_basis, self._scoring.turn, self._turned()
        windows = range(len(turned))
        asked = [reader.rotary_queries(turned.shape[-1]) for reader in self._readers]

        def pull(errors: Callable[[Ruler, int, int, int], Tensor]) -> Tensor:
            """What errors [1, T, T] of each layer, head and window pull at the key [1, n, Dr]."""
            parts: dict[tuple[int, int], Tensor] = {}

            def one(reader: _Reader, head: int) -> None:
                at, ruler = self._readers.index(reader), reader.ruler(head)
                pulls = [errors(ruler, at, head, n)[0].mT @ asked[at][n, head] for n in windows]
                parts[at, head] = reader.scaled(torch.stack(pulls), head)

            self._each_head(one, self._readers)
            back = total(part for _, part in sorted(parts.items()))
            return rotate(back, turn.conj()).flatten(0, 1)[None]

        def metric(key: Tensor) -> Tensor:
            key = rotate(key.view_as(turned), turn)

            def measured(ruler: Ruler, at: int, head: int, window: int) -> Tensor:
                read = self._readers[at].scaled(key[window], head, window)
                return ruler.measure(window, asked[at][window, head, None] @ read.mT)

            return pull(measured)

        def wanting(ruler: Ruler, at: int, head: int, window: int) -> Tensor:
            key = self._key(self._readers[at], head, turned, window)
            found = ruler.queries(window) @ key.mT
            return ruler.measure(window, ruler.reader.target[window] - found)

        white = basis.white.flatten(0, 1)[None]
        moment = gram(pull(lambda ruler, _, __, n: ruler.noise(n)))
        change = solve(white, metric, pull(wanting), moment, ridge=RIDGE, steps=STEPS)
        self._key_rows = self._key_rows + change[0] @ basis.back

    def _each_head(
        self, function: Callable[[_Reader, int], None], readers: Sequence[_Reader]
    ) -> None:
        heads = [(reader, head) for reader in readers for head in range(len(reader.rows))]
        self._each(lambda number: function(*heads[number]), range(len(heads)))

    def _turned(self) -> Tensor:
        """The rotary key [N, T, Dr] at its positions."""
        return rotate(self._key_basis.inputs @ self._key_rows.mT, self._scoring.turn)

    def _key(
        self, reader: _Reader, head: int, turned: Tensor, window: int | slice = slice(None)
    ) -> Tensor:
        """Key [N, T, D] of a head, or [T, D] of a window."""
        still = self._latents[window] @ reader.k_up[head].mT
        return reader.scaled(torch.cat([turned[window], still], -1), head, window)


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else torch.cat([rows, bias[..., None]], -1)


def _without_bias(rows: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
    return (rows[..., :-1], rows[..., -1]) if biased else (rows, None)


def _rope_first(rows: Tensor, nope: int) -> Tensor:
    return torch.cat([rows[:, nope:], rows[:, :nope]], 1)


def _nope_first(rows: Tensor, rope: int) -> Tensor:
    return torch.cat([rows[:, rope:], rows[:, :rope]], 1)

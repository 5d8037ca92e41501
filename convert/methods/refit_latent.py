"""Refitting the scores of a latent layer: its queries, its rotary key, how keys read the latent.

All are least squares problems in the metric of ``refit_scores``, solved in turn. Each head on its
own has two: its query projection, of full width, and its map from the latent to a key. The rotary
key is one problem for all heads. The latent stands, since the values are made of it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from convert.layer import AttentionLayer, Geometry, LatentLayer, Rope
from convert.methods.attention import (
    Scoring,
    key_factors,
    keys,
    logits,
    project,
    queries,
    rotate,
    values,
)
from convert.methods.fitting import Each, Observed, Shared
from convert.methods.least_squares import solve, total
from convert.methods.refit_scores import RIDGE, STEPS, Basis, Reader, Ruler, basis_of

__all__ = [
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


def shared_by(
    layer: LatentLayer, ready: AttentionLayer, scoring: Scoring, inputs: Tensor
) -> Shared:
    """Keys and values of inputs [N, T, E] with everything that scores want of them.

    Args:
        layer: The latent layer.
        ready: Its expanded form.
        scoring: Of the latent layer.
        inputs: [N, T, E].
    """
    key, value = keys(ready, scoring, inputs), values(ready, scoring, inputs)
    if layer.k is None or scoring.norm is None:
        return key, value
    factors = key_factors(scoring.norm, scoring.norm_eps, layer.k, layer.k_bias, inputs)
    return key * factors.repeat_interleave(key.shape[1] // factors.shape[1], 1)[..., None], value


def latent_basis(layer: LatentLayer, inputs: Tensor) -> Basis:
    """The latents [N, T, R] of inputs [N, T, E], as what projections are made of."""
    latents, rows = inputs @ layer.latent.mT, layer.latent
    if layer.latent_bias is not None:
        latents, rows = latents + layer.latent_bias, _with_bias(rows, layer.latent_bias)
    # rows of a latent differ in size by orders of magnitude
    there = torch.linalg.pinv(rows.double()).to(inputs.dtype)
    return Basis(latents, there, rows)


def with_expanded_values(layer: LatentLayer, fitted: AttentionLayer, basis: Basis) -> LatentLayer:
    """The latent layer with the values and the output of its refitted expanded form."""
    assert fitted.v is not None
    assert fitted.o is not None
    v_up = _with_bias(fitted.v, fitted.v_bias) @ basis.there
    return dataclasses.replace(layer, v_up=v_up, o=fitted.o, o_bias=fitted.o_bias)


def refit_latent_scores(
    layer: LatentLayer,
    observed: Observed,
    scoring: Scoring,
    inputs: Tensor,
    *,
    each: Each,
    seed: int,
) -> LatentLayer:
    """Refit queries, the rotary key, the maps from the latent to keys, and queries again.

    Args:
        layer: float32.
        observed: The original layer.
        scoring: That of the latent layer: its turn has the pairs of the rotary key alone.
        inputs: [N, T, E] input of its attention in the converted model.
        each: Calls a function for each head, in any order or at the same time.
        seed: Of the fits.
    """
    fit = _Fit(layer, observed, scoring, inputs, each=each, seed=seed)
    fit.queries()
    if layer.geometry.rope_dim:
        fit.rotary_key()
    fit.still_keys_and_queries()
    return fit.layer()


class _Fit:
    """The parts of a layer that are fitted in turn, in coordinates in which inputs are white."""

    def __init__(
        self,
        layer: LatentLayer,
        observed: Observed,
        scoring: Scoring,
        inputs: Tensor,
        *,
        each: Each,
        seed: int,
    ) -> None:
        self._start, self._scoring = layer, scoring
        # of the original, once for all the times that a head's scores are wanted
        self._truth = observed.scoring
        self._asked = queries(observed.layer, observed.scoring, observed.inputs)
        self._read = keys(observed.layer, observed.scoring, observed.inputs)
        self._each, self._seed = each, seed
        nope = layer.geometry.nope_dim
        self._basis = basis_of(inputs, bias=layer.q_bias is not None)
        bias = None if layer.q_bias is None else _rope_first(layer.q_bias, nope)
        self._rows = _with_bias(_rope_first(layer.q, nope), bias) @ self._basis.there
        same = (layer.q_bias is None) == (layer.k_rope_bias is None)
        biased = layer.k_rope_bias is not None
        self._key_basis = self._basis if same else basis_of(inputs, bias=biased)
        self._key_rows = _with_bias(layer.k_rope, layer.k_rope_bias) @ self._key_basis.there
        # no softmax sees a constant of the keys without rotation, but float32 rounds it
        latents = inputs @ layer.latent.mT
        self._latents = latents - latents.mean((0, 1))
        self._k_up = layer.k_up.clone()

    def layer(self) -> LatentLayer:
        """The layer with what was fitted."""
        rope, biased = self._start.geometry.rope_dim, self._start.q_bias is not None
        q, q_bias = _without_bias(self._rows @ self._basis.back, biased)
        biased = self._start.k_rope_bias is not None
        k_rope, k_bias = _without_bias(self._key_rows @ self._key_basis.back, biased)
        return dataclasses.replace(
            self._start,
            q=_nope_first(q, rope),
            q_bias=None if q_bias is None else _nope_first(q_bias, rope),
            k_rope=k_rope,
            k_rope_bias=k_bias,
            k_up=self._k_up,
        )

    def queries(self) -> None:
        """Refit the query projection of each head, of full width."""
        turned = self._turned()

        def refit(head: int) -> None:
            ruler = self._ruler(head)
            self._fit_queries(ruler, head, turned)

        self._each(refit, range(len(self._rows)))

    def still_keys_and_queries(self) -> None:
        """Refit the map of each head from the latent to its key, then its queries again."""
        turned = self._turned()

        def refit(head: int) -> None:
            ruler = self._ruler(head)
            self._k_up[head] = ruler.fit_still_keys(
                turned, self._latents, self._k_up[head], self._seed
            )
            self._fit_queries(ruler, head, turned)

        self._each(refit, range(len(self._rows)))

    def rotary_key(self) -> None:
        """Refit the projection of the rotary key for all heads that read it."""
        width, inputs = len(self._key_rows), self._key_basis.inputs
        windows, turn, scale = range(len(inputs)), self._scoring.turn, self._scoring.scale
        asked = rotate(project(self._rows[:, :width], None, self._basis.inputs), turn) * scale

        def back(head: int, errors: Callable[[Ruler, int], Tensor]) -> Tensor:
            """From errors [1, T, T] of each window, what the key [N, T, Dr] is asked for."""
            ruler = self._ruler(head)
            return torch.stack([errors(ruler, n)[0].mT @ asked[n, head] for n in windows])

        def summed(errors: Callable[[int, Ruler, int], Tensor]) -> Tensor:
            parts: list[Tensor | None] = [None] * len(self._rows)

            def one(head: int) -> None:
                parts[head] = back(head, partial(errors, head))

            self._each(one, range(len(parts)))
            turned = rotate(total(part for part in parts if part is not None), turn.conj())
            return (turned.flatten(0, 1).mT @ inputs.flatten(0, 1))[None]

        def missing(head: int, ruler: Ruler, window: int) -> Tensor:
            still = self._basis.inputs[window] @ self._rows[head, width:].mT * scale
            standing = still @ (self._latents[window] @ self._k_up[head].mT).mT
            return ruler.pull[window] - ruler.measure(window, standing[None])

        def normal(rows: Tensor) -> Tensor:
            key = rotate(inputs @ rows[0].mT, turn).mT
            return summed(lambda head, ruler, n: ruler.measure(n, asked[n, head, None] @ key[n]))

        self._key_rows = solve(
            normal, summed(missing), self._key_rows[None], ridge=RIDGE, steps=STEPS, seed=self._seed
        )[0]

    def _turned(self) -> Tensor:
        """The rotary key [N, T, Dr] at its positions."""
        return rotate(self._key_basis.inputs @ self._key_rows.mT, self._scoring.turn)

    def _ruler(self, head: int) -> Ruler:
        group = self._asked.shape[1] // self._read.shape[1]
        read = self._read[:, head // group, None]
        target = logits(self._asked[:, head, None], read, self._truth)
        return Ruler(Reader(self._basis, self._rows[head : head + 1], target, self._scoring))

    def _fit_queries(self, ruler: Ruler, head: int, turned: Tensor) -> None:
        key = torch.cat([turned, self._latents @ self._k_up[head].mT], -1)
        ruler.fit_queries(key, self._seed)
        self._rows[head] = ruler.reader.rows[0]


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else torch.cat([rows, bias[..., None]], -1)


def _without_bias(rows: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
    return (rows[..., :-1], rows[..., -1]) if biased else (rows, None)


def _rope_first(rows: Tensor, nope: int) -> Tensor:
    return torch.cat([rows[:, nope:], rows[:, :nope]], 1)


def _nope_first(rows: Tensor, rope: int) -> Tensor:
    return torch.cat([rows[:, rope:], rows[:, :rope]], 1)

"""Refitting the scores of a latent layer: its queries, and how they read the latent.

The rotary key and the latent stand, since all heads share them and the values are made of the
latent too. Each head on its own then has two least squares problems in the metric of
``refit_scores``: its query projection, of full width, and its map from the latent to a key.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from convert.layer import AttentionLayer, Geometry, LatentLayer, Rope
from convert.methods.attention import Scoring, rotate
from convert.methods.fitting import Each, Observed
from convert.methods.refit_scores import Basis, Reader, Ruler, basis_of

__all__ = ["expanded", "latent_basis", "refit_latent_scores", "with_expanded_values"]

_ROUNDS = 1


def expanded(layer: LatentLayer) -> AttentionLayer:
    """A latent layer as attention with a KV head for each query head, rotary dims first.

    So it computes with ``attention`` like any other layer, in plane order.
    """
    sizes, heads = layer.geometry, layer.geometry.heads
    keys = torch.cat([layer.k_rope.expand(heads, -1, -1), layer.k_up @ layer.latent], 1)
    key_bias = None
    if layer.k_rope_bias is not None:
        rest = layer.k_rope_bias.new_zeros(heads, sizes.nope_dim)
        key_bias = torch.cat([layer.k_rope_bias.expand(heads, -1), rest], 1)
    return AttentionLayer(
        geometry=Geometry(
            hidden=sizes.hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=sizes.rope_dim + sizes.nope_dim,
            value_dim=sizes.value_dim,
        ),
        q=_rope_first(layer.q, sizes.nope_dim),
        k=keys,
        v=layer.v_up @ layer.latent,
        o=layer.o,
        q_bias=None if layer.q_bias is None else _rope_first(layer.q_bias, sizes.nope_dim),
        k_bias=key_bias,
        o_bias=layer.o_bias,
        rope=Rope(dim=sizes.rope_dim, interleaved=True, theta=1.0),
    )


def latent_basis(layer: LatentLayer, inputs: Tensor) -> Basis:
    """The latents [N, T, R] of inputs [N, T, E], as what projections are made of."""
    return Basis(inputs @ layer.latent.mT, torch.linalg.pinv(layer.latent), layer.latent)


def with_expanded_values(layer: LatentLayer, fitted: AttentionLayer, basis: Basis) -> LatentLayer:
    """The latent layer with the values and the output of its refitted expanded form."""
    assert fitted.v is not None
    assert fitted.o is not None
    v_up = fitted.v @ basis.there
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
    """Refit queries, the maps from the latent to keys, and queries again.

    Args:
        layer: float32.
        observed: The original layer.
        scoring: That of the latent layer: its turn has the pairs of the rotary key alone.
        inputs: [N, T, E] input of its attention in the converted model.
        each: Calls a function for each head, in any order or at the same time.
        seed: Of the fits.
    """
    sizes = layer.geometry
    basis = basis_of(inputs, bias=layer.q_bias is not None)
    rows = _rope_first(layer.q, sizes.nope_dim)
    if layer.q_bias is not None:
        bias = _rope_first(layer.q_bias, sizes.nope_dim)
        rows = torch.cat([rows, bias[..., None]], -1)
    rows = rows @ basis.there
    turning = inputs @ layer.k_rope.mT
    if layer.k_rope_bias is not None:
        turning = turning + layer.k_rope_bias
    key_rope = rotate(turning, scoring.turn)
    latents = inputs @ layer.latent.mT
    k_up = layer.k_up.clone()

    def refit(head: int) -> None:
        reader = Reader(basis, rows[head : head + 1], observed.scores([head]), scoring)
        ruler = Ruler(reader)

        def fit_queries() -> None:
            key = torch.cat([key_rope, latents @ k_up[head].mT], -1)
            ruler.fit_queries(key, seed)

        fit_queries()
        for _ in range(_ROUNDS):
            k_up[head] = ruler.fit_still_keys(key_rope, latents, k_up[head], seed)
            fit_queries()
        rows[head] = reader.rows[0]

    each(refit, range(sizes.heads))
    back = rows @ basis.back
    q_bias = None
    if layer.q_bias is not None:
        back, q_bias = back[..., :-1], _nope_first(back[..., -1], sizes.rope_dim)
    return dataclasses.replace(layer, q=_nope_first(back, sizes.rope_dim), q_bias=q_bias, k_up=k_up)


def _rope_first(rows: Tensor, nope: int) -> Tensor:
    return torch.cat([rows[:, nope:], rows[:, :nope]], 1)


def _nope_first(rows: Tensor, rope: int) -> Tensor:
    return torch.cat([rows[:, rope:], rows[:, :rope]], 1)

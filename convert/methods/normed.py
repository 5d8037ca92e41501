"""Latents of layers whose queries and keys have a norm between projection and rotation.

The norm of a key is its weight, which belongs to the rows, and one factor for each token, which is
a number and so commutes with all that latents need: rotation, mixing across heads, a low rank.
Everything linear is done with the keys as they are before that factor, and scores are multiplied by
it. It counts where energies are measured. Queries keep their norm as it is, and a linear map of the
normed query takes the place of their rows.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attention import plane_order
from convert.methods.halves import powers
from convert.methods.latent import Factored, factored, output_bias, readers, rotary_key
from convert.methods.merge import augmented
from convert.methods.mixing import Mixed, Rows

__all__ = ["factored_whole", "mean_factors", "normed_form"]


def mean_factors(layer: AttentionLayer, norm: QkNorm, moment: Tensor) -> Tensor:
    """[H] squared factor of the norms of a query and its key, as if they did not vary with tokens.

    Args:
        layer: The original.
        norm: Of its queries and keys.
        moment: [E', E'] second moment of [x; 1].
    """
    q, k = (_power(augmented(layer, part), norm, moment) for part in ("q", "k"))
    return 1 / (q * k.repeat_interleave(layer.geometry.group))


def _power(rows: Tensor, norm: QkNorm, moment: Tensor) -> Tensor:
    """[n] mean square of heads [n, D, E'] that the norm divides by, zero if that is nothing."""
    if norm.formula == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    power = powers(rows, moment).mean(1)
    power = power.mean().expand_as(power) if norm.layout == "full" else power
    return power.clamp(min=torch.finfo(torch.float32).tiny)


def factored_whole(
    keys: Tensor,
    values: Tensor,
    *,
    key_metric: Tensor,
    value_gram: Tensor,
    moment: Tensor,
    rank: int,
) -> Factored:
    """The latent that keeps the most of keys and values, constants of the keys among it.

    A factor that differs from token to token makes a constant of the keys count, so the latent
    reads [x; 1]: its last column is a bias. Otherwise as ``factored``.
    """
    found = factored(
        pad(keys, (0, 1)),
        pad(values, (0, 1)),
        key_metric=key_metric,
        value_gram=value_gram,
        moment=pad(moment, (0, 1, 0, 1)),
        rank=rank,
        centred=False,
    )
    constant = (values - found.v_up @ found.latent) @ moment[:, -1]
    return dataclasses.replace(found, v_constant=constant)


def normed_form(
    layer: AttentionLayer,
    rows: Rows,
    mixed: Mixed,
    *,
    kept: Tensor,
    factored: Factored,
    scale: float,
) -> LatentLayer:
    """The latent layer of a cut and a factorisation, in float64.

    Args:
        layer: The original, with its norms.
        rows: Its rows, with the weight of the norms in them.
        mixed: Its keys as components.
        kept: [P, n] true where a component is a pair of the rotary key.
        factored: The rest, from ``factored_whole``.
        scale: Factor on its scores.
    """
    assert layer.q is not None
    assert layer.k is not None
    assert layer.o is not None
    own, key = readers(layer), rotary_key(mixed, kept)
    back = plane_order(layer).argsort()
    return LatentLayer(
        geometry=layer.geometry.latent(len(factored.latent), len(key.rows)),
        q=layer.q,
        latent=factored.latent[:, :-1],
        k_rope=key.rows[:, :-1],
        k_up=factored.k_up[:, back],
        v_up=factored.v_up[own],
        o=layer.o.double(),
        q_bias=layer.q_bias,
        latent_bias=factored.latent[:, -1],
        k_rope_bias=key.rows[:, -1],
        o_bias=output_bias(layer, factored.v_constant[own]),
        q_rope=_turned_queries(key.maps[own], key.planes, len(back))[..., back],
        k=layer.k,
        k_bias=layer.k_bias,
        q_norm=layer.q_norm,
        q_norm_bias=layer.q_norm_bias,
        planes=tuple(key.planes.tolist()),
        scale=scale,
    )


def _turned_queries(maps: Tensor, planes: Tensor, width: int) -> Tensor:
    """[H, 2 n, D] what makes of a query in plane order its pairs, each plane times a number.

    Args:
        maps: [H, n] complex, of the keys; queries take the conjugate.
        planes: [n] plane of each pair.
        width: D.
    """
    pair = torch.arange(len(planes))
    rows = maps.real.new_zeros(len(maps), 2 * len(planes), width)
    rows[:, 2 * pair, 2 * planes] = rows[:, 2 * pair + 1, 2 * planes + 1] = maps.real
    rows[:, 2 * pair, 2 * planes + 1] = maps.imag
    rows[:, 2 * pair + 1, 2 * planes] = -maps.imag
    return rows

"""One layer of DeepSeek's stock attention as a latent layer: the inverse of ``deepseek_layer``.

The class has a norm behind each of its down-projections. Where that norm is written to do nothing
(``convert/targets/inert.py``), or nearly so after training, both together are an affine map, which
is read here with a bound on what that neglects. Constants of a latent go where they belong: those
of keys shift all scores of a query alike and are dropped, those of values become an output bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import LatentGeometry, LatentLayer
from convert.targets.deepseek_layer import INPUT_NORM, largest_latent
from convert.targets.inert import EPSILON
from convert.targets.latent import latent_layer

__all__ = ["StockForm", "norm_error", "norm_inputs", "read_stock", "stock_shapes"]

_PREFIX = "self_attn."


@dataclass(frozen=True, slots=True, kw_only=True)
class StockForm:
    """What the config.json of a stock model says of all its layers.

    Args:
        geometry: Sizes, without the constant dim.
        biased: Whether there are biases, and with them a constant dim.
        query_rank: Dims of the latent of the queries; None if they have none.
    """

    geometry: LatentGeometry
    biased: bool
    query_rank: int | None

    @property
    def cached_rank(self) -> int:
        """Latent dims with the constant one, if there is one."""
        return self.geometry.rank + self.biased


def stock_shapes(form: StockForm) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the attention, by their names inside a layer."""
    g, cached = form.geometry, form.cached_rank
    width = g.heads * (g.nope_dim + g.rope_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (cached + g.rope_dim, g.hidden),
        "kv_a_layernorm.weight": (cached,),
        "kv_b_proj.weight": (g.heads * (g.nope_dim + g.value_dim), cached),
        "o_proj.weight": (g.hidden, g.heads * g.value_dim),
    }
    if form.query_rank is None:
        shapes |= {"q_proj.weight": (width, g.hidden)}
    else:
        shapes |= {
            "q_a_proj.weight": (form.query_rank, g.hidden),
            "q_a_layernorm.weight": (form.query_rank,),
            "q_b_proj.weight": (width, form.query_rank),
        }
    if form.biased:
        shapes |= {
            "kv_a_proj_with_mqa.bias": (cached + g.rope_dim,),
            "o_proj.bias": (g.hidden,),
        }
        if form.query_rank is not None:
            shapes |= {"q_a_proj.bias": (form.query_rank,)}
    return {_PREFIX + name: shape for name, shape in shapes.items()}


def norm_inputs(form: StockForm) -> tuple[str, ...]:
    """Tensors that ``norm_error`` reads, by their names inside a layer."""
    down = [name for name in stock_shapes(form) if "_a_" in name]
    return (*down, INPUT_NORM)


def norm_error(tensors: Mapping[str, Tensor], form: StockForm) -> float:
    """Bound on what ``read_stock`` neglects, as a share of any latent, to first order.

    Args:
        tensors: ``norm_inputs``, by their names inside a layer.
        form: What config.json says.
    """
    sides = ["kv"] if form.query_rank is None else ["kv", "q"]
    return max(_straight(tensors, side, form).error for side in sides)


def read_stock(
    tensors: Mapping[str, Tensor], form: StockForm, *, planes: tuple[int, ...], scale: float
) -> LatentLayer:
    """The latent layer that a layer computes, in float64.

    Args:
        tensors: Those of ``stock_shapes`` and the norm before them, ``INPUT_NORM``.
        form: What config.json says.
        planes: Plane of each rotary pair.
        scale: Factor on the scores that the result is to have; the queries take up the rest.
    """
    g, own = form.geometry, {n: t.double() for n, t in tensors.items()}
    factor = (g.nope_dim + g.rope_dim) ** -0.5 / scale
    if form.query_rank is None:
        q, q_bias = own[f"{_PREFIX}q_proj.weight"], None
    else:
        queries, up = _straight(tensors, "q", form), own[f"{_PREFIX}q_b_proj.weight"]
        q = up[:, : len(queries.matrix)] @ queries.matrix
        q_bias = up @ queries.shift * factor
    kv, bias = _straight(tensors, "kv", form), own.get(f"{_PREFIX}kv_a_proj_with_mqa.bias")
    return latent_layer(
        g,
        q=q * factor,
        q_bias=q_bias,
        latent=kv.matrix,
        latent_shift=kv.shift,
        k_rope=own[f"{_PREFIX}kv_a_proj_with_mqa.weight"][form.cached_rank :],
        k_rope_bias=None if bias is None else bias[form.cached_rank :],
        up=own[f"{_PREFIX}kv_b_proj.weight"],
        o=own[f"{_PREFIX}o_proj.weight"],
        o_bias=own.get(f"{_PREFIX}o_proj.bias"),
        planes=planes,
        scale=scale,
    )


@dataclass(frozen=True, slots=True)
class _Straight:
    """A down-projection and the norm behind it as an affine map.

    Args:
        matrix: [R, E], without the constant dim.
        shift: [R] or [R + 1], with it.
        error: Bound on the neglected share of what comes out, to first order.
    """

    matrix: Tensor
    shift: Tensor
    error: float


def _straight(tensors: Mapping[str, Tensor], side: str, form: StockForm) -> _Straight:
    """The map of a token to its latent, of ``kv`` or of ``q``.

    The norm divides ``D x + b`` by the root of the mean of its squares and epsilon: by that of b
    alone, but for a share of at most half of ``(2 b . D x + |D x|^2) / (|b|^2 + R epsilon)``. What
    depends on x in the constant dim is cancelled by what it changes in the divisor.
    """
    down = "kv_a_proj_with_mqa" if side == "kv" else "q_a_proj"
    weight = tensors[f"{_PREFIX}{side}_a_layernorm.weight"].double()
    rank, norm = len(weight), tensors[INPUT_NORM].double()
    rows = tensors[f"{_PREFIX}{down}.weight"][:rank].double()
    bias = torch.zeros(rank, dtype=torch.float64)
    if form.biased:
        bias = tensors[f"{_PREFIX}{down}.bias"][:rank].double()
    level = float(bias @ bias) + rank * EPSILON
    mixed = 2 * math.sqrt(rows.shape[1]) * float(((bias @ rows) * norm).norm())
    factor = weight * math.sqrt(rank / level)
    return _Straight(
        (rows * factor[:, None])[: rank - form.biased],
        bias * factor,
        (mixed + largest_latent(rows, norm) ** 2) / level / 2,
    )

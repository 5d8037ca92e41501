"""One latent layer as the tensors of DeepSeek's stock attention, exact up to one rounding.

Its class scores with ``(Dn + Dr) ** -0.5`` and has a norm on the latent, which is written inert
(``convert/targets/inert.py``). It has biases in front of its norms only: a bias of the queries is
what another constant dim is multiplied by, in a latent of the queries that is the input itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from convert.layer import LatentLayer
from convert.targets.inert import Inert, constant_norm, epsilon_norm
from kvpatch.errors import InputModelError

__all__ = ["INPUT_NORM", "InertForm", "Layout", "fitted", "largest_latent", "written"]

InertForm = Literal["constant", "epsilon"]
INPUT_NORM = "input_layernorm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What all layers of one result have in common.

    Args:
        rank: Latent dims R, without a constant one.
        planes: Source plane of each rotary pair.
        nope_dim: Dn.
        inert: How the latent norm is made inert.
        query_latent: Whether queries may have a bias, and go through a latent of their own.
        dtype: Of the tensors.
        largest: Largest Euclidean norm of a latent; None to bound it by the weights.
        rotary: Factor on the products of rotary dims.
        residual: Factor on the output.
        norm_plus_one: Whether the source's norms multiply by one plus their weight.
    """

    rank: int
    planes: tuple[int, ...]
    nope_dim: int
    inert: InertForm
    query_latent: bool
    dtype: torch.dtype
    largest: float | None
    rotary: float
    residual: float
    norm_plus_one: bool

    @property
    def rope_dim(self) -> int:
        """Rotary dims Dr."""
        return 2 * len(self.planes)

    @property
    def cached_rank(self) -> int:
        """Latent dims with the constant one, if there is one."""
        return self.rank + (self.inert == "constant")


def written(
    layer: LatentLayer, others: Mapping[str, Tensor], *, layout: Layout
) -> tuple[None, dict[str, Tensor]]:
    """All tensors of a layer that its attention needs, named without the prefix of the layer.

    Args:
        layer: With at most the sizes of ``layout``.
        others: The norm before the attention, ``INPUT_NORM``.
        layout: What all layers have in common.

    Raises:
        InputModelError: If the norm is missing, or if a bias has no place in the result.
        UsageError: If the dtype cannot hold what makes the latent norm inert.
    """
    if INPUT_NORM not in others:
        raise InputModelError(
            f"a layer of the checkpoint has no {INPUT_NORM}", hint="Download the checkpoint again."
        )
    norm = others[INPUT_NORM].double() + float(layout.norm_plus_one)
    _refuse_biases(layer, layout)
    layer = _scaled(fitted(layer, layout), layout)
    tensors = {
        **_queries(layer, norm, layout),
        **_latents(layer, norm, layout),
        "o_proj.weight": layer.o.flatten(1),
    }
    if layout.inert == "constant":
        tensors["o_proj.bias"] = _or_zeros(layer.o_bias, layer.geometry.hidden)
    named = {INPUT_NORM: norm} | {f"self_attn.{name}": value for name, value in tensors.items()}
    return None, {name: value.to(layout.dtype).contiguous() for name, value in named.items()}


def fitted(layer: LatentLayer, layout: Layout) -> LatentLayer:
    """The same function with the sizes of ``layout``, filled up with zeros.

    Raises:
        ValueError: If the layer is larger, or rotates in other planes.
    """
    own = layer.geometry
    if layer.planes not in ((), layout.planes):
        raise ValueError(f"planes {layer.planes} of a layer are not those of all, {layout.planes}")
    rank, nope = layout.rank - own.rank, layout.nope_dim - own.nope_dim
    if rank < 0 or nope < 0:
        raise ValueError(
            f"rank {own.rank} and {own.nope_dim} dims without positions exceed "
            f"{layout.rank} and {layout.nope_dim}"
        )
    rope = layout.rope_dim - own.rope_dim
    if not (rank or nope or rope):
        return layer

    def heads(rows: Tensor) -> Tensor:
        """Query rows [H, Dn + Dr, ...] with zeros behind either part."""
        rest = (0, 0) * (rows.dim() - 2)
        parts = rows[:, : own.nope_dim], rows[:, own.nope_dim :]
        return torch.cat([pad(parts[0], (*rest, 0, nope)), pad(parts[1], (*rest, 0, rope))], 1)

    return dataclasses.replace(
        layer,
        geometry=dataclasses.replace(
            own, rank=layout.rank, nope_dim=layout.nope_dim, rope_dim=layout.rope_dim
        ),
        q=heads(layer.q),
        q_bias=None if layer.q_bias is None else heads(layer.q_bias),
        latent=pad(layer.latent, (0, 0, 0, rank)),
        k_rope=pad(layer.k_rope, (0, 0, 0, rope)),
        k_rope_bias=None if layer.k_rope_bias is None else pad(layer.k_rope_bias, (0, rope)),
        k_up=pad(layer.k_up, (0, rank, 0, nope)),
        v_up=pad(layer.v_up, (0, rank)),
        planes=layout.planes,
    )


def largest_latent(latent: Tensor, norm: Tensor) -> float:
    """Bound on the Euclidean norm of a latent: no input can give a larger one.

    An RMS norm gives vectors of norm ``sqrt(E)`` at most, before its weight.

    Args:
        latent: [R, E].
        norm: Factors of the norm before it, [E].
    """
    if not bool(latent.any()):  # as in a plan, for which a spectrum of zeros would take long
        return 0.0
    rows = latent.double() * norm
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return math.sqrt(rows.shape[1] * max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))


def _scaled(layer: LatentLayer, layout: Layout) -> LatentLayer:
    """In float64, with the scale of the class and the factors of the source folded in."""
    geometry = layer.geometry
    factor = torch.full(
        (geometry.nope_dim + geometry.rope_dim,),
        layer.scale * math.sqrt(geometry.nope_dim + geometry.rope_dim),
        dtype=torch.float64,
    )
    factor[geometry.nope_dim :] *= layout.rotary
    return dataclasses.replace(
        layer,
        q=layer.q.to(torch.float64, copy=True).mul_(factor[:, None]),
        q_bias=None if layer.q_bias is None else layer.q_bias.double() * factor,
        latent=layer.latent.double(),
        k_rope=layer.k_rope.double(),
        o=layer.o.double() * layout.residual,
        o_bias=None if layer.o_bias is None else layer.o_bias.double() * layout.residual,
        scale=factor.numel() ** -0.5,
    )


def _queries(layer: LatentLayer, norm: Tensor, layout: Layout) -> dict[str, Tensor]:
    rows = layer.q.flatten(0, 1)
    if not layout.query_latent:
        return {"q_proj.weight": rows}
    hidden = layer.geometry.hidden
    largest = math.sqrt(hidden) * float(norm.abs().max())
    inert = constant_norm(largest, hidden + 1, layout.dtype)
    bias = _or_zeros(layer.q_bias, *layer.q.shape[:2]).flatten()
    return {
        "q_a_proj.weight": _down(torch.eye(hidden, dtype=torch.float64), inert),
        "q_a_proj.bias": _constant(hidden, inert),
        "q_a_layernorm.weight": _norm(hidden, inert),
        "q_b_proj.weight": torch.cat([rows * inert.up, bias[:, None] / inert.unit], 1),
    }


def _latents(layer: LatentLayer, norm: Tensor, layout: Layout) -> dict[str, Tensor]:
    geometry, largest = layer.geometry, layout.largest
    if largest is None:
        largest = largest_latent(layer.latent, norm)
    form = constant_norm if layout.inert == "constant" else epsilon_norm
    inert = form(largest, layout.cached_rank, layout.dtype)
    up = torch.cat([layer.k_up.double(), layer.v_up.double()], 1).flatten(0, 1) * inert.up
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([_down(layer.latent, inert), layer.k_rope]),
        "kv_a_layernorm.weight": _norm(geometry.rank, inert),
        "kv_b_proj.weight": pad(up, (0, layout.cached_rank - geometry.rank)),
    }
    if layout.inert == "constant":
        rotary = _or_zeros(layer.k_rope_bias, geometry.rope_dim)
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([_constant(geometry.rank, inert), rotary])
    return tensors


def _down(rows: Tensor, inert: Inert) -> Tensor:
    """Rows [R, E] of a down-projection, with the row of the constant dim if there is one."""
    return pad(rows * inert.rows, (0, 0, 0, int(inert.bias > 0)))


def _constant(rank: int, inert: Inert) -> Tensor:
    """Bias [R + 1] that gives the constant dim its value."""
    return pad(torch.zeros(rank, dtype=torch.float64), (0, 1), value=inert.bias)


def _norm(rank: int, inert: Inert) -> Tensor:
    """The norm's weight, [R] or [R + 1]."""
    weight = torch.full((rank,), inert.weight, dtype=torch.float64)
    return pad(weight, (0, int(inert.bias > 0)), value=inert.unit_weight)


def _or_zeros(bias: Tensor | None, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64) if bias is None else bias.double()


_BIASES: Sequence[tuple[str, str]] = (
    ("q_bias", "queries"),
    ("k_rope_bias", "rotary keys"),
    ("o_bias", "output, or values,"),
)


def _refuse_biases(layer: LatentLayer, layout: Layout) -> None:
    """Refuse biases that would be left out."""
    held = {"k_rope_bias", "o_bias"} if layout.inert == "constant" else set()
    for field, what in _BIASES:
        bias: Any = getattr(layer, field)
        if field in held or (field == "q_bias" and layout.query_latent):
            continue
        if bias is not None and bool(bias.any()):
            raise InputModelError(
                f"the {what} of a layer have a bias, for which a file without biases has no place",
                hint="Write the form with biases, which transformers loads.",
            )

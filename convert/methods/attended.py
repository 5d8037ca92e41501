"""What the attention of a layer makes of its keys and values, measured on text.

A score matters as much as the output it moves: to first order, an error of the score of query t
with token s changes the output of head h by ``a_ts |O_h (v_s - o_t)|`` times it, ``a`` being the
attention weight, ``v_s`` the value and ``o_t`` what the head gives. Energies here carry the square
of that, so that errors of keys and of values are in one unit: power of the residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.attention import (
    key_factors,
    keys,
    logits,
    project,
    projected_queries,
    queries,
    weights,
)
from convert.methods.fitting import Observed
from convert.methods.mixing import Mixed, Rows

__all__ = ["Attended", "attended", "presumed"]

_ROWS = 128  # queries of a window that are looked at, evenly spread


@dataclass(frozen=True, slots=True)
class Attended:
    """Moments of one layer under its attention, in float64.

    Args:
        energy: [H, P, n] of each component of the keys in the scores of each query head, were it
            not turned.
        turn: [H, P, n] complex: mean of the turn ``exp(i (s - t) theta)`` between key and query,
            weighted by that energy. What remains if a constant takes the place of the turn is
            ``1 - |turn|^2``.
        queries: [H, D, D] second moment of the queries, unrotated, in plane order.
        values: [H, H] mean over queries of ``sum_s a_h,ts a_g,ts``.
    """

    energy: Tensor
    turn: Tensor
    queries: Tensor
    values: Tensor


@torch.no_grad()
def attended(
    observed: Observed, mixed: Mixed, *, read: Tensor | None = None, by_output: bool = True
) -> Attended:
    """Measure a layer.

    Args:
        observed: The original layer and what it did on the text.
        mixed: Components of its keys.
        read: [N, T, E] inputs that the components are made of; None for its own.
        by_output: Weigh scores by what they move; else by the attention weight alone.
    """
    layer = observed.layer
    assert layer.q is not None
    heads, group = layer.geometry.heads, layer.geometry.group
    planes, count = mixed.energy.shape
    kind, turn = observed.inputs.dtype, observed.scoring.turn
    turn = turn.to(kind.to_complex()) / turn.abs()
    energy = torch.zeros(heads, planes, count, dtype=torch.float64)
    turned = torch.zeros(heads, planes, count, dtype=torch.complex128)
    width = layer.geometry.head_dim
    asked = torch.zeros(heads, width, width, dtype=torch.float64)
    together = torch.zeros(heads, heads, dtype=torch.float64)
    rows = mixed.rows.flatten(0, 1)
    rows = torch.cat([rows.real, rows.imag]).to(turn.device, kind)
    seen = 0
    for window, inputs in zip(
        _windows(observed), observed.inputs if read is None else read, strict=True
    ):
        chosen = torch.linspace(0, len(inputs) - 1, min(_ROWS, len(inputs))).long()
        attention = _weights(window, chosen)
        importance = _importance(window, attention) if by_output else attention
        importance = importance * _key_powers(window)
        query = projected_queries(layer, window.scoring, window.inputs[:, chosen])[0]
        parts = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1) @ rows.mT
        power = parts.square().view(len(parts), 2, planes, count).sum(1)
        size = query[..., : 2 * planes].square().reshape(*query.shape[:2], planes, 2).sum(-1)
        back = size * turn[chosen].conj()
        # what the chosen queries make of each token in each plane, before its components are told
        made = importance.mT @ torch.cat([size, back.real, back.imag], -1)
        still, real, imaginary = torch.split(made, [planes] * 3, -1)
        spun = torch.complex(real, imaginary) * turn
        energy += torch.einsum("hsp,spn->hpn", still, power).double().cpu()
        turned += torch.complex(
            *(torch.einsum("hsp,spn->hpn", part, power) for part in (spun.real, spun.imag))
        ).to(turned)
        total = importance.sum(-1)
        asked += torch.einsum("ht,htd,hte->hde", total, query, query).double().cpu()
        flat = attention.flatten(1)
        together += (flat @ flat.mT).double().cpu()
        seen += len(chosen)
    scale = mixed.maps.abs().square().repeat_interleave(group, 0)
    mean = turned / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    return Attended(scale * energy / seen, mean, asked / seen, together / seen)


def presumed(
    layer: AttentionLayer,
    rows: Rows,
    mixed: Mixed,
    weights: Tensor,
    frequencies: Tensor,
    *,
    context: int,
    factors: Tensor | None = None,
) -> Attended:
    """What is assumed where no text is at hand.

    Inputs are white, attention falls with distance like ``1 / (1 + distance)``, heads attend
    independently, and keys matter as much as values.

    Args:
        layer: The original.
        rows: Its rows.
        mixed: Components of its keys.
        weights: [H, P] energy of the queries in each plane.
        frequencies: [P] radians per token.
        context: Longest distance, in tokens.
        factors: [H] mean square of what norms multiply scores by; None if there are none.
    """
    distance = torch.arange(context, dtype=torch.float64)
    share = 1 / (1 + distance)
    angle = distance[:, None] * frequencies.double()
    mean = (share[:, None] * torch.polar(torch.ones_like(angle), -angle)).sum(0) / share.sum()
    maps = mixed.maps.abs().square().repeat_interleave(layer.geometry.group, 0)
    factors = weights.new_ones(len(weights)) if factors is None else factors
    metric = rows.q @ rows.q.mT * factors[:, None, None]
    own = rows.k.repeat_interleave(layer.geometry.group, 0)
    keys = torch.einsum("hde,hdf,hfe->", own, metric, own)
    assert layer.o is not None
    outputs = torch.einsum(
        "ehd,hdf->ehf", layer.o.double(), rows.v.repeat_interleave(layer.geometry.group, 0)
    )
    power = outputs.square().sum()
    balance = keys / power if power > 0 else power  # without an outcome no values matter
    heads = layer.geometry.heads
    return Attended(
        maps * (weights * factors[:, None])[..., None],
        mean[:, None].expand(heads, *mixed.energy.shape),
        metric,
        balance * torch.eye(heads, dtype=torch.float64),
    )


def _windows(observed: Observed) -> Iterator[Observed]:
    for n in range(len(observed.inputs)):
        yield dataclasses.replace(observed, inputs=observed.inputs[n : n + 1])


def _weights(window: Observed, chosen: Tensor) -> Tensor:
    """Attention weights [H, t, T] of the chosen queries."""
    scoring = window.scoring
    offset = None if scoring.offset is None else scoring.offset[:, chosen]
    part = dataclasses.replace(
        scoring, visible=scoring.visible[chosen], turn=scoring.turn[chosen], offset=offset
    )
    query = queries(window.layer, part, window.inputs[:, chosen])
    return weights(logits(query, keys(window.layer, scoring, window.inputs), part), part)[0]


def _key_powers(window: Observed) -> Tensor:
    """Square of the factor [H or 1, 1, T] that a norm has on the keys of each query head."""
    layer, scoring = window.layer, window.scoring
    assert layer.k is not None
    if scoring.norm is None:
        return torch.ones_like(window.inputs[..., 0])[:, None]
    factors = key_factors(scoring.norm, scoring.norm_eps, layer.k, layer.k_bias, window.inputs)[0]
    return factors.square().repeat_interleave(layer.geometry.heads // len(factors), 0)[:, None]


def _importance(window: Observed, attention: Tensor) -> Tensor:
    """``a_ts^2 |O_h (v_s - o_t)|^2`` [H, t, T] of the chosen queries."""
    layer = window.layer
    assert layer.v is not None
    assert layer.o is not None
    value = project(layer.v, layer.v_bias, window.inputs)[0]
    value = value.repeat_interleave(layer.geometry.group, 0)
    gram = torch.einsum("ehd,ehf->hdf", layer.o, layer.o)
    output = attention @ value
    read = value @ gram
    far = (read * value).sum(-1)[:, None] - 2 * output @ read.mT
    distance = far + (output @ gram * output).sum(-1, keepdim=True)
    return attention.square() * distance.clamp(min=0)

"""Refits of the scores of a latent layer as dense least squares, from the formula of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import LatentLayer
from convert.methods.refit_scores import Basis, basis_of
from tests.methods.latent_cases import Case, E, N, T
from tests.methods.references import causal_weights, heads_of, key_factors_of, normed

__all__ = ["RIDGE", "Unknowns", "unknowns", "with_rotary_key"]

RIDGE = 0.05  # four would leave little of the fits, which are of few tokens


@dataclass(slots=True)
class Unknowns:
    """The two maps of one head as the refit sees them, rotary dims first.

    With a norm the first reads the normed queries of the head.
    """

    case: Case
    head: int
    basis: Basis
    query: Tensor  # [D, E']; with a norm [Dr + Dn, Dn]
    up: Tensor  # [Dn, R]

    @property
    def noise(self) -> Tensor:
        """Random errors of its scores [N, T, T]."""
        return _noise(self.case, self.head)

    def layer(self, query: Tensor, up: Tensor) -> LatentLayer:
        """The latent layer with these maps for its head."""
        layer, head = self.case.layer, self.head
        if layer.q_rope is not None:
            rotary, still = query.split([layer.geometry.rope_dim, layer.geometry.nope_dim])
            q_rope, k_up = layer.q_rope.clone(), layer.k_up.clone()
            q_rope[head], k_up[head] = rotary, still.T @ up
            return dataclasses.replace(layer, q_rope=q_rope, k_up=k_up)
        rows = torch.roll(query, -layer.geometry.rope_dim, 0)
        q, k_up = layer.q.clone(), layer.k_up.clone()
        q[head], k_up[head] = rows[:, :E], up
        if layer.q_bias is None:
            return dataclasses.replace(layer, q=q, k_up=k_up)
        bias = layer.q_bias.clone()
        bias[head] = rows[:, E]
        return dataclasses.replace(layer, q=q, q_bias=bias, k_up=k_up)

    def scores(self, query: Tensor, up: Tensor) -> Tensor:
        """[N, T, T] of the head."""
        return self.case.scores(self.layer(query, up))[:, self.head]

    def fit_map(self) -> None:
        """A map of the queries as they are, solved for where they are white."""
        asked = self.basis.inputs @ self.query.T
        flat = asked.flatten(0, 1)
        moment = flat.T @ flat / len(flat)
        floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment + floor)
        away = torch.linalg.inv(root)
        before = self.query
        found = _solved(
            self.case.targets()[:, self.head],
            lambda change: self.scores(change @ away @ before, self.up),
            root,
            asked @ away.T,
            self.noise,
            "ntr,ntru->ntu",
        )
        self.query = found @ away @ before

    def fit_query(self) -> None:
        back = self.basis.back
        found = _solved(
            self.case.targets()[:, self.head],
            lambda query: self.scores(query @ back, self.up),
            torch.linalg.solve(back.T, self.query.T).T,
            self.basis.white,
            self.noise,
            "ntr,ntru->ntu",
        )
        self.query = found @ back

    def fit_up(self) -> None:
        layer = self.case.layer
        latents = self.case.inputs @ layer.latent.T
        power = (latents - latents.mean((0, 1))).square().mean()
        if self.case.norm is not None:
            assert layer.latent_bias is not None
            factors = [key_factors_of(layer, self.case.norm, x) for x in self.case.inputs]
            own = self.head * factors[0].shape[1] // layer.geometry.heads
            latents = torch.stack(factors)[..., own, None] * (latents + layer.latent_bias)
            power = latents.square().mean()
        self.up = _solved(
            self.case.targets()[:, self.head],
            lambda up: self.scores(self.query, up),
            self.up,
            latents,
            self.noise,
            "ntr,ntru->nru",
            power=power,
        )


def _noise(case: Case, head: int) -> Tensor:
    """Random errors of the scores of a head [N, T, T]: a root of their metric times signs."""
    shares = causal_weights(case.targets()[:, head])
    draws = torch.Generator().manual_seed(5 + head)
    signs = 2 * torch.randint(2, (1, T, T), generator=draws, dtype=torch.int8)[0].double() - 1
    root = torch.diag_embed(shares.sqrt()) - shares[..., :, None] * shares.sqrt()[..., None, :]
    return (root @ signs[..., None])[..., 0]


def _solved(
    target: Tensor,
    of: Callable[[Tensor], Tensor],
    start: Tensor,
    inputs: Tensor,
    noise: Tensor,
    pull: str,
    power: Tensor | None = None,
) -> Tensor:
    """Dense least squares of scores that are affine in a projection [D, E'], with the ridge.

    The error of each row of scores counts by the square root of ``diag p - p p^T``. The ridge is
    some part of what random errors pull at the projected inputs [N, T, E'] of each token, times the
    power of inputs, of which a constant may be left out.
    """
    shares = causal_weights(target)
    root = shares.sqrt()[..., None] * (torch.eye(T).double() - shares[..., None, :])
    nothing = of(torch.zeros_like(start))
    units = torch.eye(start.numel(), dtype=torch.float64).view(-1, *start.shape)
    plain = torch.stack([of(unit) - nothing for unit in units], -1)
    design = torch.einsum("...tsr,...tru->...tsu", root, plain).flatten(0, -2)
    wanted = torch.einsum("...tsr,...tr->...ts", root, target - nothing).flatten()
    # what the outputs of a token are pulled by, which comes times each of its inputs
    pulled = torch.einsum(pull, noise, plain).unflatten(-1, start.shape).square().sum(-1)
    pulled = (pulled / inputs.square().sum(-1, keepdim=True)).sum((0, 1)).mean()
    share = RIDGE * start.shape[-1] / (N * T)
    strength = share * pulled * (inputs.square().mean() if power is None else power)
    ridge = strength.sqrt() * torch.eye(start.numel(), dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([design, ridge]),
        torch.cat([wanted, strength.sqrt() * start.flatten()])[:, None],
    ).solution
    return solution.view(start.shape)


def with_rotary_key(case: Case) -> LatentLayer:
    """The layer with the best rotary key for the queries of all heads."""
    layer, biased = case.layer, case.layer.k_rope_bias is not None
    basis = basis_of(case.inputs, bias=biased)
    start = layer.k_rope
    if layer.k_rope_bias is not None:
        start = torch.cat([start, layer.k_rope_bias[:, None]], 1)

    def of(white: Tensor) -> LatentLayer:
        rows = white @ basis.back
        bias = rows[:, E] if biased else None
        return dataclasses.replace(layer, k_rope=rows[:, :E], k_rope_bias=bias)

    heads = range(case.original.geometry.heads)
    found = _solved(
        case.targets(),
        lambda white: case.scores(of(white)),
        torch.linalg.solve(basis.back.T, start.T).T,
        basis.white,
        torch.stack([_noise(case, head) for head in heads], 1),
        "nhtr,nhtru->nru",
    )
    return of(found)


def unknowns(case: Case, head: int) -> Unknowns:
    layer, biased = case.layer, case.layer.q_bias is not None
    if layer.q_rope is not None:
        heads = [normed(heads_of(layer, "q", x), case.norm, layer.q_norm) for x in case.inputs]
        basis = basis_of(torch.stack(heads)[:, :, head], bias=False)
        same = torch.eye(layer.geometry.nope_dim, dtype=torch.float64)
        query = torch.cat([layer.q_rope[head], same])
        return Unknowns(case, head, basis, query, layer.k_up[head])
    basis = basis_of(case.inputs, bias=biased)
    rows = layer.q[head]
    if layer.q_bias is not None:
        rows = torch.cat([rows, layer.q_bias[head][:, None]], 1)
    query = torch.roll(rows, layer.geometry.rope_dim, 0)
    return Unknowns(case, head, basis, query, layer.k_up[head])

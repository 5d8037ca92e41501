"""Refits of scores as dense least squares, and readers of keys for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convert.methods.attention import Scoring
from convert.methods.refit_scores import Basis, Reader, basis_of
from tests.helpers import assert_close
from tests.methods.layers import randn

__all__ = [
    "HEADS",
    "D",
    "E",
    "N",
    "T",
    "dense_queries",
    "divergence",
    "fitted_in_turn",
    "random_reader",
    "rotated_key",
    "white_basis",
]

N, T, E, D, HEADS = 3, 8, 4, 6, 2


def white_basis(*, bias: bool, seed: int) -> Basis:
    scales = torch.linspace(0.3, 2, E, dtype=torch.float64)
    return basis_of(randn(N, T, E, seed=seed) * scales + 0.5, bias=bias)


def random_reader(scoring: Scoring, *, bias: bool, seed: int) -> Reader:
    basis = white_basis(bias=bias, seed=seed)
    rows = randn(HEADS, D, basis.inputs.shape[-1], seed=seed + 1)
    return Reader(basis, rows, 2 * randn(N, HEADS, T, T, seed=seed + 2), scoring)


def rotations(scoring: Scoring) -> Tensor:
    """Rotation matrices [T, D, D] of neighbouring dims."""
    matrices = torch.eye(D, dtype=torch.float64).repeat(T, 1, 1)
    for plane in range(scoring.turn.shape[1]):
        i, j, turn = 2 * plane, 2 * plane + 1, scoring.turn[:, plane]
        matrices[:, i, i] = matrices[:, j, j] = turn.real
        matrices[:, j, i] = turn.imag
        matrices[:, i, j] = -turn.imag
    return matrices


def _slope_and_rows(reader: Reader) -> tuple[Tensor, Tensor]:
    """Slope of the cap at the scores of the original, and its attention rows: [N, g, T, T] each."""
    target, scoring = reader.target, reader.scoring
    slope = torch.ones_like(target)
    if scoring.softcap is not None:
        slope = 1 / torch.cosh(target / scoring.softcap) ** 2
        target = scoring.softcap * torch.tanh(target / scoring.softcap)
    return slope, torch.softmax(target.masked_fill(~scoring.visible, -torch.inf), -1)


def metric_of(reader: Reader) -> Tensor:
    """``diag p - p p^T`` of every attention row, through the slope of the cap: [N, g, T, T, T]."""
    slope, rows = _slope_and_rows(reader)
    hessian = torch.diag_embed(rows) - rows[..., :, None] * rows[..., None, :]
    return slope[..., :, None] * hessian * slope[..., None, :]


def scores_of(reader: Reader, key: Tensor) -> Tensor:
    """[N, g, T, T] for rotated keys [N, T, D]."""
    turned = torch.einsum(
        "tfd,nte,gde->ngtf", rotations(reader.scoring), reader.basis.inputs, reader.rows
    )
    return reader.scoring.scale * turned @ key[:, None].mT


def divergence(readers: Sequence[Reader], key: Tensor) -> float:
    """Half of the sum of ``d^T (diag p - p p^T) d`` over all attention rows."""
    total = 0.0
    for reader in readers:
        error = scores_of(reader, key) - reader.target
        total += 0.5 * float(torch.einsum("ngts,ngtsr,ngtr->", error, metric_of(reader), error))
    return total


def _solved(
    jacobian: Tensor, metric: Tensor, target: Tensor, start: Tensor, strength: Tensor
) -> Tensor:
    """Dense ridge solution: jacobian [rows, T, unknowns], metric [rows, T, T], target [rows, T]."""
    normal = torch.einsum("rsi,rsq,rqj->ij", jacobian, metric, jacobian)
    pull = torch.einsum("rsi,rsq,rq->i", jacobian, metric, target)
    ridged = normal + strength * torch.eye(len(normal), dtype=torch.float64)
    return torch.linalg.solve(ridged, pull + strength * start)


def _noise(reader: Reader, seed: int) -> Tensor:
    """Random errors of scores [N, g, T, T]: a root of the metric times signs."""
    slope, shares = _slope_and_rows(reader)
    draws = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, shares.shape[1:], generator=draws, dtype=torch.int8).double() - 1
    root = torch.diag_embed(shares.sqrt()) - shares[..., :, None] * shares.sqrt()[..., None, :]
    assert_close(
        slope[..., None] * (root @ root.mT) * slope[..., None, :], metric_of(reader), atol=1e-12
    )
    return reader.share**0.5 * slope * (root @ signs[None, ..., None])[..., 0]


def _strength(pull: Tensor, inputs: Tensor) -> Tensor:
    """The ridge for what random errors pull at the outputs [..., D] of a projection."""
    share = 4 * inputs.shape[-1] / inputs[..., 0].numel()
    return share * pull.square().flatten(0, -2).sum(0).mean() * inputs.square().mean()


def dense_queries(reader: Reader, key: Tensor, seed: int) -> Tensor:
    """The projection of each head, solved for in white coordinates."""
    white, back = reader.basis.white, reader.basis.back
    start = torch.linalg.solve(back.T, reader.rows.mT).mT
    found = [
        _dense_query(reader, key, head, white, start[head], seed) for head in range(len(start))
    ]
    return torch.stack(found) @ back


def _dense_maps(reader: Reader, key: Tensor, seed: int) -> Tensor:
    """The projection of each head after a map [D, D], solved for where queries are white."""
    found = []
    for head, rows in enumerate(reader.rows):
        asked = reader.basis.inputs @ rows.T
        flat = asked.flatten(0, 1)
        moment = flat.T @ flat / len(flat)
        floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(D, dtype=torch.float64)
        root = torch.linalg.cholesky(moment + floor)
        white = torch.linalg.solve(root, asked.mT).mT
        fitted = _dense_query(reader, key, head, white, root, seed)
        found.append(fitted @ torch.linalg.inv(root) @ rows)
    return torch.stack(found)


def _dense_query(
    reader: Reader, key: Tensor, head: int, white: Tensor, start: Tensor, seed: int
) -> Tensor:
    """Rows of one head that read white inputs [N, T, E']."""
    rotation, scale = rotations(reader.scoring), reader.scoring.scale
    jacobian = torch.einsum("tfd,nsf,nte->ntsde", rotation, key, white) * scale
    pull = torch.einsum("tfd,nsf,nts->ntd", rotation, key, _noise(reader, seed)[:, head]) * scale
    return _solved(
        jacobian.flatten(0, 1).flatten(2),
        metric_of(reader)[:, head].flatten(0, 1),
        reader.target[:, head].flatten(0, 1),
        start.flatten(),
        _strength(pull, white),
    ).reshape(start.shape)


def _dense_keys(readers: Sequence[Reader], basis: Basis, rows: Tensor, seed: int) -> Tensor:
    rotation, white = rotations(readers[0].scoring), basis.white
    jacobians, metrics, targets, pulls = [], [], [], []
    for number, reader in enumerate(readers):
        query = torch.einsum("tfd,nte,gde->ngtf", rotation, reader.basis.inputs, reader.rows)
        query = query * reader.scoring.scale
        jacobian = torch.einsum("ngtf,sfd,nse->ngtsde", query, rotation, white)
        jacobians.append(jacobian.flatten(0, 2).flatten(2))
        metrics.append(reader.share * metric_of(reader).flatten(0, 2))
        targets.append(reader.target.flatten(0, 2))
        noise = _noise(reader, seed + number)
        pulls.append(torch.einsum("ngts,ngtf,sfd->nsd", noise, query, rotation))
    system = (torch.cat(jacobians), torch.cat(metrics), torch.cat(targets))
    start = torch.linalg.solve(basis.back.T, rows.mT).mT
    found = _solved(*system, start.flatten(), _strength(sum(pulls, torch.zeros(())), white))
    return found.reshape(start.shape) @ basis.back


def fitted_in_turn(readers: Sequence[Reader], basis: Basis, rows: Tensor, seed: int) -> Tensor:
    """Maps of queries, keys, queries, all dense; replaces the rows of the readers."""
    scoring = readers[0].scoring
    for number, reader in enumerate(readers):
        reader.rows = _dense_maps(reader, rotated_key(basis.inputs, rows, scoring), seed + number)
    rows = _dense_keys(readers, basis, rows, seed)
    for number, reader in enumerate(readers):
        reader.rows = dense_queries(reader, rotated_key(basis.inputs, rows, scoring), seed + number)
    return rows


def rotated_key(inputs: Tensor, rows: Tensor, scoring: Scoring) -> Tensor:
    return torch.einsum("tfd,nte,de->ntf", rotations(scoring), inputs, rows)

"""RoPE planes: what a rotary head may be multiplied by without changing what it means.

RoPE turns pair (i, j) of a head by the angle ``position * theta_f``. Read the pair as one complex
number: then the turn is a product, and so commutes with every complex matrix that acts across heads
on one plane. The score of a query with a key is ``Re sum_f q_f conj(k_f)`` plus the real product of
the dims that do not rotate. All functions here work on rows: a head is [D, E + 1], its last column
the bias, so that ``head @ [x; 1]`` is the vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import Rope
from convert.methods.halves import covariance

__all__ = [
    "Merged",
    "Planes",
    "floored",
    "join",
    "key_covariance",
    "merge_complex",
    "merge_real",
    "planes_of",
    "real_covariance",
    "split",
]

# relative floor on weights and metrics: far below what matters, far above rounding in float64
_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Planes:
    """Dims of a head: P pairs (first, second) that rotate together, and N others that do not."""

    first: Tensor
    second: Tensor
    rest: Tensor


@dataclass(frozen=True, slots=True)
class Merged:
    """Several heads replaced by one.

    Args:
        rows: [P, E'] complex or [N, E'] real: the one that stays.
        maps: [g, P] complex or [g, N, N] real: member h is approximated by ``maps[h] * rows``.
        total: [g] weighted energy of each member.
        lost: [g] the part of it that the approximation loses.
    """

    rows: Tensor
    maps: Tensor
    total: Tensor
    lost: Tensor


def planes_of(rope: Rope, head_dim: int) -> Planes:
    """Where the planes of a head lie."""
    pairs = torch.arange(rope.dim // 2)
    first, second = (
        (2 * pairs, 2 * pairs + 1) if rope.interleaved else (pairs, pairs + rope.dim // 2)
    )
    return Planes(first, second, torch.arange(rope.dim, head_dim))


def split(heads: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    """Heads [n, D, E'] as complex planes [n, P, E'] and real rest [n, N, E']."""
    return torch.complex(heads[:, planes.first], heads[:, planes.second]), heads[:, planes.rest]


def join(turning: Tensor, rest: Tensor, planes: Planes) -> Tensor:
    """The inverse of ``split``."""
    heads = rest.new_empty(len(rest), 2 * turning.shape[1] + rest.shape[1], rest.shape[2])
    heads[:, planes.first] = turning.real
    heads[:, planes.second] = turning.imag
    heads[:, planes.rest] = rest
    return heads


def merge_complex(members: Tensor, weights: Tensor, moment: Tensor | None) -> Merged:
    """Best single key for several, plane by plane: the top of a weighted Hermitian PCA.

    Minimises ``sum_h a_h E|k_h - c_h z|^2`` over complex z = w x and c_h, where a_h is the energy
    of the queries that read member h in that plane. Mean (c = 1) and phase alignment (|c| = 1) are
    special cases, so neither can lose less.

    Args:
        members: [g, P, E'] complex rows.
        weights: [g, P] query energies a >= 0; all zero counts as equal.
        moment: [E', E'] second moment of the input; None for the identity.

    Returns:
        ``rows`` [P, E'] and ``maps`` [g, P] = c, with z scaled to the mean power of the members.
    """
    weights = floored(weights)
    read = covariance(_weighted(members, weights).transpose(0, 1), moment)
    values, vectors = torch.linalg.eigh(read)
    # an eigenvector has a free phase: the largest entry is made real and positive
    top = vectors[..., -1]
    anchor = top.gather(1, top.abs().argmax(1, keepdim=True))
    top = (top * (anchor.conj() / anchor.abs())).T
    rows = torch.einsum("gp,gpe->pe", top.conj(), _weighted(members, weights))
    maps = top / weights.sqrt()
    size = maps.abs().square().mean(0).sqrt()
    total = read.diagonal(dim1=1, dim2=2).real.sum(0)
    kept = top.abs().square() @ values[:, -1]
    return Merged(rows * size[:, None], maps / size, total, total - kept)


def merge_real(members: Tensor, metrics: Tensor, moment: Tensor | None) -> Merged:
    """Best single block for several, without planes: a weighted PCA.

    Minimises ``sum_h E|L_h^T (v_h - B_h z)|^2`` over z = w x of the width of one member and real
    B_h, where ``metrics[h] = L_h L_h^T`` says how much each direction of member h is read.

    Args:
        members: [g, N, E'] rows.
        metrics: [g, N, N] positive semidefinite.
        moment: [E', E'] second moment of the input; None for the identity.

    Returns:
        ``rows`` [N, E'] and ``maps`` [g, N, N] = B.
    """
    count, width, _ = members.shape
    if not width:
        nothing = members.new_zeros(count)
        return Merged(members.sum(0), metrics, nothing, nothing)
    roots, inverses = _roots(metrics)
    scaled = (roots @ members).flatten(0, 1)
    read = covariance(scaled, moment)
    values, vectors = torch.linalg.eigh(read)
    top = vectors[:, -width:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    maps = inverses @ top.reshape(count, width, width)
    total = read.diagonal().reshape(count, width).sum(1)
    kept = (top.square() @ values[-width:].flip(0)).reshape(count, width).sum(1)
    return Merged(top.T @ scaled, maps, total, total - kept)


def key_covariance(heads: Tensor, weights: Tensor, moment: Tensor | None) -> Tensor:
    """Weighted covariance [P, n, n] of n heads in each plane; see ``merge_complex``."""
    return covariance(_weighted(heads, floored(weights)).transpose(0, 1), moment)


def real_covariance(heads: Tensor, metrics: Tensor, moment: Tensor | None) -> Tensor:
    """Weighted covariance [n, N, n, N] of n heads; see ``merge_real``."""
    if not heads.shape[1]:
        return heads.new_zeros(len(heads), 0, len(heads), 0)
    scaled = _roots(metrics)[0] @ heads
    sizes = heads.shape[:2]
    return covariance(scaled.flatten(0, 1), moment).view(*sizes, *sizes)


def _weighted(heads: Tensor, weights: Tensor) -> Tensor:
    return weights.sqrt()[..., None] * heads


def floored(weights: Tensor) -> Tensor:
    """Weights with the zeros lifted, so that their roots can be divided by."""
    mean = weights.mean(0)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return weights + _FLOOR * mean


def _roots(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots [g, N, N] of the metrics and their inverses, eigenvalues floored."""
    values, vectors = torch.linalg.eigh(metrics)
    largest = values.amax()
    floor = _FLOOR * (largest if largest > 0 else torch.ones_like(largest))
    roots = (values.clamp(min=0) + floor).sqrt()
    return (
        (vectors * roots[:, None]) @ vectors.mT,
        (vectors / roots[:, None]) @ vectors.mT,
    )

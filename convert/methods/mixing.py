"""Complex mixing of KV heads: the keys of each RoPE plane in the order of what they matter.

All that commutes with the rotation of one plane across ``Hkv`` heads is a complex matrix, so the
keys of a plane may be replaced by any invertible complex combination of them, if the queries take
up the inverse. Here it is the weighted Hermitian PCA: component 0 of a plane carries the most of
the scores, and so on. Real mixing (arXiv:2502.07864, section 4.2) is the subgroup without phases,
and so never carries more in its first components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import AttentionLayer, QkNorm
from convert.methods.attention import plane_order, with_head_order
from convert.methods.halves import powers
from convert.methods.merge import augmented
from convert.planes import floored, key_covariance

__all__ = ["Mixed", "Mixture", "Rows", "mixture", "query_energy", "rows_of"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The projections of a layer as rows [n, D, E + 1] in float64, the bias as last column.

    Heads are in plane order: dims (2p, 2p + 1) are plane p, of P, and the other dims follow.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    planes: int

    @property
    def turning_q(self) -> Tensor:
        """[H, P, E'] complex."""
        return _complex(self.q, self.planes)

    @property
    def turning_k(self) -> Tensor:
        """[Hkv, P, E'] complex."""
        return _complex(self.k, self.planes)


@dataclass(frozen=True, slots=True)
class Mixture:
    """How keys become components and components keys.

    Args:
        maps: [Hkv, P, n] complex, as of ``Mixed``.
        inverse: [P, n, Hkv] complex: component j of plane p is what ``inverse[p, j]`` makes of the
            keys of all heads.
        energy: [P, n] as of ``Mixed``.
    """

    maps: Tensor
    inverse: Tensor
    energy: Tensor

    def of(self, rows: Rows) -> Mixed:
        """The components of a layer."""
        components = torch.einsum("pjg,gpe->pje", self.inverse, rows.turning_k)
        return Mixed(components, self.maps, self.energy)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Keys as components.

    The key of head g in plane p is ``sum_j maps[g, p, j] * (rows[p, j] @ [x; 1])``, exactly.

    Args:
        rows: [P, n, E'] complex, n = Hkv; each component has power one, the strongest first.
        maps: [Hkv, P, n] complex.
        energy: [P, n] what each component carries of the weighted energy of the keys.
    """

    rows: Tensor
    maps: Tensor
    energy: Tensor


def rows_of(layer: AttentionLayer, norm: QkNorm | None = None) -> Rows:
    """Rows of a layer with q, k, v and ``rope``.

    Args:
        layer: The original.
        norm: Of its queries and keys. Their rows then have its weight, but not its factor, nor the
            bias that it may add to queries.
    """
    rope = layer.rope
    assert rope is not None
    layer = with_head_order(layer, plane_order(layer))
    q, k, v = (augmented(layer, part) for part in ("q", "k", "v"))
    if norm is not None:
        q, k = _weighted(q, norm, layer.q_norm), _weighted(k, norm, layer.k_norm)
    return Rows(q, k, v, rope.dim // 2)


def _weighted(rows: Tensor, norm: QkNorm, weight: Tensor | None) -> Tensor:
    """Rows [n, D, E'] of heads with all of a norm that is linear."""
    assert weight is not None
    if norm.formula == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    factor = weight.double() + 1 if norm.formula == "rms_plus_one" else weight.double()
    return rows * factor[..., None]


def query_energy(rows: Rows, moment: Tensor) -> Tensor:
    """[H, P] energy of the queries of each head in each plane, for inputs of a second moment."""
    pairs = rows.q[:, : 2 * rows.planes]
    return powers(pairs, moment).view(len(pairs), rows.planes, 2).sum(-1)


def mixture(rows: Rows, moment: Tensor, weights: Tensor) -> Mixture:
    """How the keys of all planes become components.

    Args:
        rows: Of the layer.
        moment: [E', E'] second moment of [x; 1].
        weights: [Hkv, P] energy of the queries that read each head in each plane.
    """
    weights = floored(weights)
    covariance = key_covariance(rows.turning_k, weights, moment)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    power, root = floored(values.mT).mT.sqrt(), weights.sqrt().mT
    return Mixture(
        maps=(vectors * power[:, None] / root[..., None]).transpose(0, 1),
        inverse=vectors.mH * root[:, None] / power[..., None],
        energy=values,
    )


def _complex(heads: Tensor, planes: int) -> Tensor:
    pairs = heads[:, : 2 * planes].reshape(len(heads), planes, 2, heads.shape[-1])
    return torch.complex(pairs[:, :, 0], pairs[:, :, 1])

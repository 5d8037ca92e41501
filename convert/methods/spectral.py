"""Roots and leading directions of second moments as wide as a model's hidden states.

A whole eigendecomposition of such a matrix takes longer than all else that is done to a layer, so
none is made of a wide one. Any square root whitens as well as the symmetric one, hence Cholesky's.
And of all directions only as many are wanted as a latent has dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["leading", "lower_root"]

_SMALL = 1024  # width up to which the whole matrix is decomposed
_BLOCK = 64  # directions by which a basis grows; with fewer, more of its products are small
_NEW = 8  # directions with which it begins anew whenever it was not large enough
# a basis is large enough if it gains less than this: of the whole energy, which finds a low rank
# exactly, or, in all steps to come, of what the leading directions leave out anyway. Where the
# spectrum is flat gains fall more slowly than foreseen: measured, three times as much is lost there
_ENOUGH, _NEXT_TO_NOTHING = 1e-11, 1 / 1000
_LARGEST = 5 / 8  # of the space: a larger basis takes as long as the whole


def lower_root(moment: Tensor, floor: float) -> Tensor:
    """Lower triangular L [n, n] with ``L L^T = moment + floor``, which is a variance of all dims.

    Args:
        moment: [n, n] positive semidefinite, float64.
        floor: Far above what rounding makes of the moment.
    """
    lifted = moment.clone()
    lifted.diagonal().add_(floor)
    root: Tensor = torch.linalg.cholesky(lifted)
    return root


def leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a matrix and their vectors.

    By block Lanczos with full reorthogonalisation (Golub and Underwood, 1977): a basis grows until
    it gains next to nothing of the leading energy, and the pairs are those of the matrix on it.
    Where eigenvalues differ little, which eigenvectors they are is open to any method; the energy
    that they keep is not, but for next to nothing.

    Args:
        gram: [n, n] positive semidefinite, float64.
        count: How many, at most n.

    Returns:
        Values [count], the largest first, and orthonormal vectors [n, count].
    """
    size = len(gram)
    widths = range(max(2 * count, 4 * _BLOCK), int(_LARGEST * size), max(count // 2, 2 * _BLOCK))
    if size > _SMALL and widths:
        basis, whole = _Basis(gram, widths), float(gram.trace())
        kept, gain = -math.inf, math.inf
        for width in widths:
            basis.grow(width)
            before, kept = kept, float(torch.linalg.eigvalsh(basis.projected)[-count:].sum())
            last, gain = gain, kept - before
            left_out = _NEXT_TO_NOTHING * (whole - kept)
            if gain <= _ENOUGH * whole or _ahead(last, gain) <= left_out:
                values, vectors = _largest(basis.projected, count)
                return values, basis.vectors @ vectors
    return _largest(gram, count)


def _ahead(last: float, gain: float) -> float:
    """What further steps would gain, if gains go on to fall as from the last one to this one."""
    if not gain < last < math.inf:
        return math.inf
    return gain**2 / (last - gain)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


class _Basis:
    """An orthonormal basis of block Krylov spaces of a matrix [n, n], and the matrix on it."""

    def __init__(self, gram: Tensor, widths: range) -> None:
        self._gram, self._width = gram, 0
        room = widths[-1] + _BLOCK + len(widths) * _NEW
        self._vectors = gram.new_empty(len(gram), room)
        self._projected = gram.new_empty(room, room)
        self._generator = torch.Generator().manual_seed(0)
        self._image = self._random(_BLOCK)

    @property
    def vectors(self) -> Tensor:
        """[n, width]."""
        return self._vectors[:, : self._width]

    @property
    def projected(self) -> Tensor:
        """[width, width] ``vectors^T gram vectors``."""
        return self._projected[: self._width, : self._width]

    def grow(self, width: int) -> None:
        """Add blocks until there are ``width`` vectors, or up to a block more.

        Of an eigenvalue no more copies are found than vectors were begun with, so new ones begin.
        """
        self._image = torch.cat([self._image, self._random(_NEW)], 1)
        while self._width < width:
            block = self._image
            for _ in range(2):  # once leaves what rounding makes of nearly dependent vectors
                block = torch.linalg.qr(block - self.vectors @ (self.vectors.mT @ block)).Q
            new = slice(self._width, self._width + block.shape[1])
            self._vectors[:, new] = block
            self._width = new.stop
            self._image = self._gram @ block
            column = self.vectors.mT @ self._image
            self.projected[:, new] = column
            self.projected[new] = column.mT

    def _random(self, count: int) -> Tensor:
        size, kind = len(self._gram), self._gram.dtype
        return torch.randn(size, count, generator=self._generator, dtype=kind)

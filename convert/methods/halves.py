"""Products of which half mirrors the other half, or is zero: only the rest is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["covariance", "gram", "mirrored", "powers", "times_lower"]

_BLOCK = 512  # rows or columns at a time: narrower products take longer than what they save


def gram(rows: Tensor) -> Tensor:
    """Inner products [..., D, D] of the columns of [..., n, D]."""
    return mirrored(rows, rows)


def mirrored(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` [..., D, D] of [..., n, D] each, which is known to be symmetric."""
    width = left.shape[-1]
    found = left.new_empty(*left.shape[:-2], width, width)
    for block in _blocks(width):
        found[..., block, : block.stop] = left[..., block].mT @ right[..., : block.stop]
        found[..., : block.start, block] = found[..., block, : block.start].mT
    return found


def times_lower(rows: Tensor, root: Tensor) -> Tensor:
    """``rows @ root`` [..., n, D] of a lower triangular root [D, D]."""
    flat = rows.flatten(0, -2)  # one product, not one for each head
    found = torch.zeros_like(flat)
    for block in _blocks(len(root)):
        found[:, : block.stop].addmm_(flat[:, block], root[block, : block.stop])
    return found.view(rows.shape)


def covariance(rows: Tensor, moment: Tensor | None) -> Tensor:
    """``rows moment rows^H`` [..., n, n] of real or complex rows [..., n, E'].

    Args:
        rows: What reads inputs.
        moment: [E', E'] second moment of the inputs, real; None for the identity.
    """
    if moment is None:
        return rows @ rows.mH
    half = _times_half(rows, moment) @ rows.mH
    return half + half.mH


def powers(rows: Tensor, moment: Tensor | None) -> Tensor:
    """Diagonal [..., n] of ``covariance``, real."""
    if moment is None:
        return rows.abs().square().sum(-1)
    if rows.is_complex():
        return powers(rows.real, moment) + powers(rows.imag, moment)
    return 2 * (_times_half(rows, moment) * rows).sum(-1)


def _times_half(rows: Tensor, moment: Tensor) -> Tensor:
    """``rows @ half``, where ``moment = half + half^T``."""
    half = moment.tril()
    half.diagonal().mul_(0.5)
    if not rows.is_complex():
        return times_lower(rows, half)
    return torch.complex(times_lower(rows.real, half), times_lower(rows.imag, half))


def _blocks(width: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, width, _BLOCK))

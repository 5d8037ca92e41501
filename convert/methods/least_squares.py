"""Least squares whose normal equations are known only by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["solve", "total"]


def solve(
    normal: Callable[[Tensor], Tensor],
    pull: Tensor,
    start: Tensor,
    *,
    ridge: float,
    steps: int,
    seed: int,
) -> Tensor:
    """Conjugate gradients on ``(A + r) w = pull + r start``, one system for each leading index.

    Args:
        normal: Product with A, positive semidefinite.
        pull: [n, ...] right hand side.
        start: [n, ...] where to begin, and what the ridge r pulls towards.
        ridge: r, relative to the mean diagonal of A.
        steps: Number of steps.
        seed: Of the random signs whose product with A estimates its mean diagonal.
    """
    each = (-1, *[1] * (start.dim() - 1))
    signs = torch.randint(0, 2, start.shape, generator=torch.Generator().manual_seed(seed))
    probe = (2 * signs - 1).to(start)
    strength = ridge * (probe * normal(probe)).flatten(1).mean(1).view(each)
    solution = start
    residual = pull - normal(start)
    direction = residual
    power = residual.square().flatten(1).sum(1)
    # below it a residual is rounding, along which there is nothing to gain
    enough = torch.finfo(pull.dtype).eps ** 2 * pull.square().flatten(1).sum(1)
    for _ in range(steps):
        image = normal(direction) + strength * direction
        length = power / (direction * image).flatten(1).sum(1).clamp(min=torch.finfo().tiny)
        length = torch.where(power > enough, length, 0.0)
        solution = solution + length.view(each) * direction
        residual = residual - length.view(each) * image
        next_power = residual.square().flatten(1).sum(1)
        ratio = next_power / power.clamp(min=torch.finfo().tiny)
        direction = residual + ratio.view(each) * direction
        power = next_power
    return solution


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of an iterable of tensors, one at a time."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total

"""Least squares over a projection: in a metric known only by products with it, or in none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from convert.methods.halves import gram

__all__ = ["RIDGE", "Tick", "no_tick", "ridged", "solve", "total"]

Tick = Callable[[], None]

# of the mean diagonal of the normal matrix, for as many input dims as rows. What few rows say of
# many dims is of those rows alone: measured, with 16 rows for each dim this saves a third of the
# loss that a hundredth of the diagonal leaves, and with 96 it is no worse
RIDGE = 4.0


def no_tick() -> None:
    """A tick that nobody counts."""


def solve(
    inputs: Tensor,
    metric: Callable[[Tensor], Tensor],
    missing: Tensor,
    moment: Tensor,
    *,
    ridge: float,
    steps: int,
    tick: Tick = no_tick,
) -> Tensor:
    """What to add to projections [g, D, E'] of inputs X, one system for each of them.

    Conjugate gradients on ``(X^T M X + r) w = X^T m`` from zero on. If the inputs are white and
    independent of the metric M, ``X^T M X`` comes to one matrix [D, D] for every input dim; with
    that as a preconditioner five steps end where tens do without.

    Args:
        inputs: [1 or g, n, E'] X.
        metric: Product of M, positive semidefinite, with projected inputs [g, n, D].
        missing: [g, n, D] m, what the projected inputs lack, in the metric.
        moment: [g, D, D] that matrix for inputs of power one.
        ridge: r, relative to its mean diagonal times E' / n; it pulls towards no change.
        steps: Number of steps.
        tick: Called after each of them.
    """
    moment = moment * inputs.square().mean((1, 2), keepdim=True)
    relative = ridge * inputs.shape[2] / inputs.shape[1]
    strength = (relative * moment.diagonal(dim1=1, dim2=2).mean(1))[:, None, None]
    strength = strength.clamp(min=torch.finfo().tiny)
    lifted = (moment + strength * torch.eye(moment.shape[1]).to(moment)).double()
    inverse = torch.linalg.inv(lifted).to(moment)
    residual = missing.mT @ inputs
    solution = torch.zeros_like(residual)
    direction = image = inverse @ residual
    power = _product(residual, image)
    # below it a residual is rounding, along which there is nothing to gain
    enough = torch.finfo(residual.dtype).eps ** 2 * power
    for _ in range(steps):
        image = metric(inputs @ direction.mT).mT @ inputs + strength * direction
        # the ridge alone gives it so much: where a metric is next to zero, rounding takes from it
        least = (strength * _product(direction, direction)).clamp(min=torch.finfo().tiny)
        length = power / _product(direction, image).maximum(least)
        length = torch.where(power > enough, length, 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        image = inverse @ residual
        before, power = power, _product(residual, image)
        direction = image + power / before.clamp(min=torch.finfo().tiny) * direction
        tick()
    return solution


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Inner products [g, 1, 1]."""
    return (one * other).sum((1, 2), keepdim=True)


def ridged(inputs: Tensor, wanted: Tensor, strength: float) -> Tensor:
    """What minimises ``|X w - y|^2 + r |w|^2``, [D, E].

    Args:
        inputs: [n, D] X.
        wanted: [n, E] y.
        strength: r, relative to the mean power of a column of X.
    """
    tokens, dims = inputs.shape
    few = tokens < dims  # then X^T (X X^T + r)^-1 y is the same and takes less
    moment = gram(inputs.mT if few else inputs).double()
    # inputs of zeros give zeros
    least = torch.finfo(torch.float32).tiny
    moment.diagonal().add_((strength * moment.trace() / dims).clamp(min=least))
    pulled = wanted if few else inputs.mT @ wanted
    solved: Tensor = torch.linalg.solve(moment, pulled.double()).to(wanted.dtype)
    return inputs.mT @ solved if few else solved


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of an iterable of tensors, one at a time."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total

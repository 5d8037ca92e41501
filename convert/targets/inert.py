"""A latent RMSNorm that does nothing: how to write a layer so that the norm of MLA cancels.

The stock class normalises the latent, ``n = c / sqrt(mean(c^2) + eps) * w``, and no ordinary
attention has such a norm. Its divisor is made almost constant, and the up-projection takes up the
constant. Two ways:

- ``constant``: one more latent dim holds a constant C, far above all others.
- ``epsilon``: the latent is so small that the epsilon of the norm is far above it.

Either way the norm divides by ``level * sqrt(1 + (rows |c| / level)^2)`` and not by ``level``, up
to the root of the rank: a relative error of at most ``(rows |c| / level)^2 / 2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvpatch.errors import UsageError

__all__ = ["EPSILON", "Inert", "constant_norm", "epsilon_norm"]

EPSILON = 1e-6  # of the latent norms in transformers, whatever rms_norm_eps says
_MARGIN = 4  # a token twice as large as the largest one foreseen still errs below rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Inert:
    """How a layer is written around its latent norm.

    All but ``up`` are powers of two, or roundings that are known: the norm itself adds no error
    but the one above.

    Args:
        rows: Factor on the latent rows of the down-projection.
        bias: The constant C; 0 if there is none.
        weight: The norm's weight, the same for all latent dims.
        up: Factor on the columns of the up-projection.
        unit_weight: The norm's weight of the constant dim.
        unit: What the constant dim is after the norm.
        level: What the norm divides by, times the root of the rank.
    """

    rows: float
    bias: float
    weight: float
    up: float
    unit_weight: float
    unit: float
    level: float

    def error(self, largest: float) -> float:
        """Largest relative error of a latent of Euclidean norm ``largest`` or less."""
        return (self.rows * largest / self.level) ** 2 / 2


def constant_norm(largest: float, rank: int, dtype: torch.dtype) -> Inert:
    """The norm made inert by a constant dim, which a bias of the down-projection gives.

    Args:
        largest: Largest Euclidean norm of a latent.
        rank: Latent dims, the constant one included.
        dtype: Of the weights and activations.

    Raises:
        UsageError: If ``dtype`` is float16 and does not hold such latents.
    """
    _check_finite(largest)
    limit = torch.finfo(dtype).max
    if dtype is torch.float16 and largest > limit:
        raise UsageError(
            f"latents up to {largest:.3g} overflow in float16, which ends at {limit:.0f}",
            hint="Choose --dtype bfloat16 or float32.",
        )
    wanted = _power_above(largest * _distance(dtype)) if largest else 1.0
    rows = min(1.0, _power_below(limit) / wanted)
    return _around(rows, wanted * rows, rank, dtype)


def epsilon_norm(largest: float, rank: int, dtype: torch.dtype) -> Inert:
    """The norm made inert by its epsilon, without any bias.

    Args:
        largest: Largest Euclidean norm of a latent.
        rank: Latent dims.
        dtype: Of the weights and activations.

    Raises:
        UsageError: If ``dtype`` is float16, whose smallest numbers are too large for this.
    """
    _check_finite(largest)
    if dtype is torch.float16:
        raise UsageError(
            "a latent norm without biases needs numbers below those of float16",
            hint="Choose --dtype bfloat16 or float32.",
        )
    level = math.sqrt(rank * EPSILON)
    rows = _power_below(level / (largest * _distance(dtype))) if largest else 1.0
    return _around(rows, 0.0, rank, dtype)


def _around(rows: float, bias: float, rank: int, dtype: torch.dtype) -> Inert:
    level, root = math.sqrt(bias**2 + rank * EPSILON), math.sqrt(rank)
    weight = _power_below(min(level / (rows * root), torch.finfo(dtype).max))
    unit_weight = _power_below(1 / root)
    return Inert(
        rows=rows,
        bias=bias,
        weight=weight,
        up=level / (rows * root * weight),
        unit_weight=unit_weight,
        unit=bias * root * unit_weight / level,
        level=level,
    )


def _distance(dtype: torch.dtype) -> float:
    """How far above the largest latent the level must be for a quarter of the unit roundoff."""
    return math.sqrt(_MARGIN / torch.finfo(dtype).eps)


def _check_finite(largest: float) -> None:
    if not 0 <= largest < math.inf:
        raise ValueError(f"largest must be finite and not negative, found {largest}")


def _power_below(value: float) -> float:
    """The largest power of two that is not above a positive number; exact, unlike a logarithm."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def _power_above(value: float) -> float:
    """The smallest power of two that is not below a positive number."""
    below = _power_below(value)
    return below if below == value else 2 * below

"""Refitting value and output projections: the converted outcome as near to what is wanted.

The outcome of attention is linear in the output projection while values stand, and in the value
projection while the output stands. The first is a ridge regression; the second is solved by
conjugate gradients, one KV head at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.methods.least_squares import solve, total

__all__ = ["ValueReader", "refit_output", "refit_values"]

_OUTPUT_RIDGE = 1e-3  # of the mean power of a head's dim, towards what the projection was
_VALUE_RIDGE = 1e-3  # of the mean diagonal of the normal matrix, likewise
_STEPS = 10


@dataclass(frozen=True, slots=True)
class ValueReader:
    """Query heads of one layer that read one KV head.

    Args:
        weights: [N, g, T, T] their attention weights.
        output: [E, g, Dv] their part of the output projection.
        target: [N, T, E] what they should add to the outcome of the layer's other heads.
    """

    weights: Tensor
    output: Tensor
    target: Tensor


def refit_values(
    readers: Sequence[ValueReader], inputs: Tensor, rows: Tensor, *, seed: int
) -> Tensor:
    """Refit the value projection of one KV head for all that read it.

    Args:
        readers: Everything that reads it.
        inputs: [N, T, E'] inputs of the projection, white.
        rows: [Dv, E'] the projection in the same coordinates.
        seed: Of the probe that measures the scale of the ridge.
    """
    grams = [reader.output.flatten(1).mT @ reader.output.flatten(1) for reader in readers]

    def gradient(window: int, pulls: Sequence[Tensor]) -> Tensor:
        """From pulls [T, g * Dv] on the heads of each reader."""
        back = total(
            (reader.weights[window].mT @ _split(pull, reader)).sum(0)
            for reader, pull in zip(readers, pulls, strict=True)
        )
        return back.mT @ inputs[window]

    def normal(rows: Tensor) -> Tensor:
        def of(window: int) -> Tensor:
            value = inputs[window] @ rows[0].mT
            mixed = [(r.weights[window] @ value).transpose(0, 1).flatten(1) for r in readers]
            return gradient(window, [m @ gram for m, gram in zip(mixed, grams, strict=True)])

        return total(of(n) for n in range(len(inputs)))[None]

    pull = total(
        gradient(n, [r.target[n] @ r.output.flatten(1) for r in readers])
        for n in range(len(inputs))
    )
    return solve(normal, pull[None], rows[None], ridge=_VALUE_RIDGE, steps=_STEPS, seed=seed)[0]


def _split(heads: Tensor, reader: ValueReader) -> Tensor:
    """[T, g * Dv] as [g, T, Dv]."""
    return heads.reshape(len(heads), *reader.output.shape[1:]).transpose(0, 1)


def refit_output(
    heads: Tensor, target: Tensor, output: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ridge regression of the output projection towards what it was.

    Args:
        heads: [N, T, H, Dv] head outputs of the converted layer.
        target: [N, T, E] what they should add up to.
        output: [E, H, Dv] the projection so far, float32 or float64.
        bias: [E], or None where the class has none.

    Returns:
        The projection and its bias, in their dtypes.
    """
    before = output.flatten(1)
    if bias is not None:
        before = torch.cat([before, bias[:, None].to(before.dtype)], 1)
    before = before.double().mT
    gram = before.new_zeros(len(before), len(before))
    pull = torch.zeros_like(before)
    for rows, wanted in zip(heads.flatten(2), target, strict=True):
        if bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)  # noqa: PLW2901
        gram += rows.mT @ rows
        pull += rows.mT @ wanted
    # heads that give nothing at all leave the projection as it was
    strength = (_OUTPUT_RIDGE * gram.diagonal().mean()).clamp(min=1e-12)
    gram.diagonal().add_(strength)
    fitted = torch.linalg.solve(gram, pull + strength * before).mT
    width = output[0].numel()
    rows = fitted[:, :width].reshape(output.shape).to(output.dtype)
    return rows, None if bias is None else fitted[:, width].to(bias.dtype)

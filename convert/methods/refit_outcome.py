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

from convert.methods.least_squares import RIDGE, ridged, solve, total

__all__ = ["ValueReader", "refit_output", "refit_values"]

_OUTPUT_RIDGE = 1e-3  # of the mean power of a head's dim, towards what the projection was
_STEPS = 5


@dataclass(frozen=True, slots=True)
class ValueReader:
    """Query heads of one layer that read one KV head.

    Args:
        weights: [N, g, T, T] their attention weights.
        output: [E, g, Dv] their part of the output projection.
        missing: [N, T, E] what the outcome of the layer lacks.
    """

    weights: Tensor
    output: Tensor
    missing: Tensor

    def pull(self, window: int, heads: Tensor) -> Tensor:
        """What heads [T, g * Dv] pull at values [T, Dv]."""
        each = heads.view(len(heads), *self.output.shape[1:]).transpose(0, 1)
        return self.weights[window].flatten(0, 1).mT @ each.flatten(0, 1)

    def moment(self) -> Tensor:
        """[Dv, Dv] what values of tokens of power one, independent of each other, come to."""
        reads = self.weights.transpose(0, 1).flatten(1)
        return torch.einsum("hg,ehd,egf->df", reads @ reads.mT, self.output, self.output)


def refit_values(readers: Sequence[ValueReader], inputs: Tensor) -> Tensor:
    """Refit the value projection of one KV head for all that read it.

    Args:
        readers: Everything that reads it.
        inputs: [N, T, R] inputs of the projection, white.

    Returns:
        What to add to it, [Dv, R].
    """
    flat = [reader.output.flatten(1) for reader in readers]
    both = [(reader, rows.mT @ rows) for reader, rows in zip(readers, flat, strict=True)]
    windows = range(len(inputs))

    def metric(value: Tensor) -> Tensor:
        def of(window: int, value: Tensor) -> Tensor:
            return total(
                reader.pull(window, (reader.weights[window] @ value).transpose(0, 1).flatten(1) @ m)
                for reader, m in both
            )

        each = value.view(*inputs.shape[:2], -1)
        return torch.cat([of(n, each[n]) for n in windows])[None]

    pairs = list(zip(readers, flat, strict=True))
    missing = torch.cat(
        [total(reader.pull(n, reader.missing[n] @ rows) for reader, rows in pairs) for n in windows]
    )
    return solve(
        inputs.flatten(0, 1)[None],
        metric,
        missing[None],
        total(reader.moment() for reader in readers)[None],
        ridge=RIDGE,
        steps=_STEPS,
    )[0]


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
    rows, before = heads.flatten(2), output.flatten(1)
    if bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
        before = torch.cat([before, bias[:, None].to(before.dtype)], 1)
    rows, lacking = rows.flatten(0, 1), (target - rows @ before.mT).flatten(0, 1)
    fitted, width = before + ridged(rows, lacking, _OUTPUT_RIDGE).mT, output[0].numel()
    return fitted[:, :width].reshape(output.shape), None if bias is None else fitted[:, width]

"""How far a kernel is from the truth, and tensors with layouts and holes to try it on."""

from __future__ import annotations

import torch
from torch import Tensor

# relative error of sums of products whose operands are rounded once, with a margin of about two
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64; NaN if any element is."""
    truth = expected.double()
    return float((actual.double() - truth).norm() / truth.norm())


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest truth, in float64; NaN if any element is."""
    truth = expected.double()
    return float((actual.double() - truth).abs().max() / truth.abs().max())


def assert_close(actual: Tensor, expected: Tensor, *, factor: float = 1.0) -> None:
    """Fail unless a result of a kernel is the truth, as far as its number format can say.

    Args:
        actual: Of the kernel; its number format decides what is close.
        expected: The truth in float64, of the same shape.
        factor: On the tolerance, for results of more roundings than one, gradients for example.
    """
    assert actual.shape == expected.shape
    bound = factor * TOLERANCE[actual.dtype]
    # written so that NaN fails
    assert relative_error(actual, expected) < bound
    assert largest_error(actual, expected) < 4 * bound


def with_poison(tensor: Tensor, *, dim: int, before: int = 0, after: int = 0) -> Tensor:
    """The same numbers as a slice of a larger tensor, which is NaN around it.

    Args:
        tensor: Of any strides.
        dim: Where the larger tensor is longer.
        before: By how much before the slice.
        after: By how much after it.
    """
    shape = list(tensor.shape)
    length = shape[dim]
    shape[dim] += before + after
    held = tensor.new_full(shape, torch.nan).narrow(dim, before, length)
    held.copy_(tensor)
    return held


def laid_out_as(tensor: Tensor, *order: int) -> Tensor:
    """The same tensor with other strides, as if its dimensions had been stored in this order.

    ``laid_out_as(query, 0, 2, 1, 3)`` is [B, H, T, D] that lies in memory as [B, T, H, D].
    """
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)

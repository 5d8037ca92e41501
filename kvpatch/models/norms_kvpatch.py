"""Norms of queries and keys in latent attention.

A norm divides every key by one number, its root mean square or its standard deviation, and that
commutes with everything linear: rotations, mixing across heads, a low rank. So the latent is that
of keys which are not normed, and the number's inverse is cached beside it as a factor on scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["HeadLinear", "key_scales", "norm_epsilon"]


class HeadLinear(nn.Module):
    """A linear map of its own for each head, without bias.

    Args:
        heads: Number of heads H.
        inputs: Dims of a head.
        outputs: Dims of what it becomes.
    """

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, outputs, inputs) * inputs**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """[B, H, T, inputs] to [B, H, T, outputs]."""
        return states @ self.weight.transpose(1, 2)


def key_scales(keys: Tensor, scales: int, *, epsilon: float, centred: bool) -> Tensor:
    """What a norm without weight multiplies keys by, [B, T, ``scales``].

    Args:
        keys: [B, T, Hkv * D].
        scales: Parts that are normed apart: all KV heads, or 1 if they are normed together.
        epsilon: Of the norm, added to the mean of the squares.
        centred: Subtract the mean first, as LayerNorm does.
    """
    parts = keys.view(*keys.shape[:-1], scales, -1).float()
    if centred:
        parts = parts - parts.mean(-1, keepdim=True)
    return torch.rsqrt(parts.pow(2).mean(-1) + epsilon).to(keys.dtype)


def norm_epsilon(norm: nn.Module) -> float:
    """Epsilon of a norm of transformers, or of the norms that it holds."""
    for part in norm.modules():
        for name in ("variance_epsilon", "eps"):
            if hasattr(part, name):
                return float(getattr(part, name))
    raise ValueError(f"{type(norm).__name__} has no epsilon under a name that is known")

"""How alike the inputs of layers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["similarity", "token_gram"]

_COMPARED_TOKENS = 512


def token_gram(inputs: Tensor) -> Tensor:
    """Inner products [n, n] of some of the tokens of inputs [N, T, E], centred, of norm one."""
    tokens = inputs.flatten(0, 1)
    tokens = tokens[:: -(-len(tokens) // _COMPARED_TOKENS)].double()
    tokens = tokens - tokens.mean(0)
    products = tokens @ tokens.mT
    normed: Tensor = products / products.norm()
    return normed.float().cpu()


def similarity(grams: Sequence[Tensor]) -> list[list[float]]:
    """Linear centred kernel alignment of each two layers, 0 to 1.

    Source: Kornblith et al., arXiv:1905.00414, equation 1.

    Args:
        grams: ``token_gram`` of every layer, of the same tokens.
    """
    flat = torch.stack([one.flatten() for one in grams]).double()
    matrix: list[list[float]] = (flat @ flat.mT).clamp(0, 1).tolist()
    return matrix

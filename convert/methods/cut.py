"""Which components of the keys stay rotary: the pairs of the one key that all heads share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from convert.methods.attended import Attended

__all__ = ["Selection", "kept_components", "lost_without_turn"]

Selection = Literal["greedy", "per-frequency", "stride"]


def lost_without_turn(attended: Attended) -> Tensor:
    """[P, n] energy that each component of the keys loses with its rotation, over all heads."""
    return (attended.energy * (1 - attended.turn.abs().square()).clamp(min=0)).sum(0)


def kept_components(
    lost: Sequence[Tensor], pairs: int, selection: Selection, *, common: bool
) -> list[Tensor]:
    """For each layer which components stay rotary, [P, n] of bools.

    ``greedy`` takes those that would lose the most, several of a plane if need be;
    ``per-frequency`` at most one of each plane; ``stride`` the first of planes at equal distances,
    as if the key had a RoPE of its own.

    Args:
        lost: [P, n] of each layer, what its components lose without rotation; P may be 0.
        pairs: Components that stay, ``Dr / 2``.
        selection: How they are chosen.
        common: Take as many of each plane in all layers, as classes with one table of frequencies
            need it.
    """
    turning = [_allowed(_shares(layer), pairs, selection) for layer in lost if len(layer)]
    if common and turning:
        total = torch.stack([layer.sort(1, descending=True).values for layer in turning]).sum(0)
        counts = _greedy(total, pairs).sum(1)
        chosen = iter([_best(layer, counts) for layer in turning])
    else:
        chosen = iter([_greedy(layer, pairs) for layer in turning])
    return [next(chosen) if len(layer) else layer.bool() for layer in lost]


def _shares(lost: Tensor) -> Tensor:
    """What components lose, of what their layer does; zeros for a layer that loses nothing."""
    return lost / lost.sum().clamp(min=torch.finfo(lost.dtype).tiny)


def _allowed(lost: Tensor, pairs: int, selection: Selection) -> Tensor:
    """What components lose, minus infinity for those that the selection rules out."""
    if selection == "greedy":
        return lost
    allowed = torch.zeros_like(lost, dtype=torch.bool)
    allowed.scatter_(1, lost.argmax(1, keepdim=True), True)
    if selection == "stride":
        step = len(lost) // pairs
        planes = torch.arange(len(lost))
        allowed &= ((planes % step == 0) & (planes < step * pairs))[:, None]
    return lost.masked_fill(~allowed, -torch.inf)


def _greedy(lost: Tensor, pairs: int) -> Tensor:
    kept = torch.zeros(lost.numel(), dtype=torch.bool)
    kept[lost.flatten().argsort(descending=True, stable=True)[:pairs]] = True
    return kept.view(lost.shape)


def _best(lost: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[p]`` largest entries of each row p."""
    rank = lost.argsort(stable=True, dim=1, descending=True).argsort(1)
    best: Tensor = rank < counts[:, None]
    return best

"""One budget of cached numbers, distributed over layers by what each of them would lose.

A rotary pair caches two numbers and a dim of the latent one. For given pairs the best ranks are
exact: of all dims of all latents the ones that keep the most, since each spectrum falls. The pairs
are those that a price per number suggests (Lagrange); every price tried is held against the others
and against an equal split, by what it is predicted to lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Prospect", "distributed"]

_PRICES = 48  # halvings of the interval in which the price lies


@dataclass(frozen=True)
class Prospect:
    """What a unit would lose at any sizes, in the first approximation and in a unit's own energy.

    Args:
        turning: By the number of rotary pairs, energy that is lost with the rotation of the rest.
        spectra: By the same, [R] energy that each further dim of the latent keeps, falling.
        beyond: By the same, energy that a latent of all these dims leaves out.
        weight: What its energy counts beside that of other units.
    """

    turning: Mapping[int, float]
    spectra: Mapping[int, Tensor]
    beyond: Mapping[int, float]
    weight: float

    def lost(self, pairs: int, rank: int) -> float:
        """What is lost with these sizes, weighted."""
        return self.weight * (self.turning[pairs] + float(self.tails[pairs][rank]))

    def nearest(self, pairs: int) -> int:
        """The most pairs up to ``pairs`` that its keys have."""
        return min(pairs, max(self.turning))

    @cached_property
    def tails(self) -> Mapping[int, Tensor]:
        """By pairs, [R + 1] what a latent of each rank from 0 on leaves out."""
        return {
            pairs: torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
            + self.beyond[pairs]
            for pairs, spectrum in self.spectra.items()
        }

    def at_price(self, price: float) -> tuple[int, int]:
        """Pairs and rank that cost least, if each cached number costs ``price``."""
        ranks = {
            pairs: max(1, int((self.weight * spectrum > price).sum()))
            for pairs, spectrum in self.spectra.items()
        }
        return min(
            ranks.items(), key=lambda item: self.lost(*item) + price * (2 * item[0] + item[1])
        )


def distributed(
    prospects: Sequence[Prospect], numbers: int, *, start: Sequence[int]
) -> list[tuple[int, int]]:
    """Pairs and rank of each unit that lose least in sum.

    Args:
        prospects: Of each unit.
        numbers: What all of them cache together, ``sum(2 * pairs + rank)``; less only if nothing
            more can be held.
        start: Pairs of each unit in an equal split; the result loses no more than with them.
    """
    chosen = [list(start)]
    low = 0.0
    high = max(float(p.weight * s.max()) for p in prospects for s in p.spectra.values())
    high += max(p.weight * max(p.turning.values()) for p in prospects)
    for _ in range(_PRICES):
        price = (low + high) / 2
        sizes = [prospect.at_price(price) for prospect in prospects]
        dear = sum(2 * pairs + rank for pairs, rank in sizes) > numbers
        low, high = (price, high) if dear else (low, price)
        chosen.append([pairs for pairs, _ in sizes])
    found = [
        list(zip(pairs, _best_ranks(prospects, pairs, numbers), strict=True))
        for pairs in chosen
        if numbers >= sum(2 * count + 1 for count in pairs)
    ]
    return min(found, key=lambda sizes: _lost(prospects, sizes))


def _lost(prospects: Sequence[Prospect], sizes: Sequence[tuple[int, int]]) -> float:
    return sum(p.lost(*own) for p, own in zip(prospects, sizes, strict=True))


def _best_ranks(prospects: Sequence[Prospect], pairs: Sequence[int], numbers: int) -> list[int]:
    """The ranks of at least 1 that lose least for given pairs."""
    gains = [p.weight * p.spectra[count] for p, count in zip(prospects, pairs, strict=True)]
    owner = torch.cat([torch.full((len(g) - 1,), unit) for unit, g in enumerate(gains)])
    further = torch.cat([gain[1:] for gain in gains])
    free = numbers - len(gains) - 2 * sum(pairs)
    best = further.argsort(descending=True, stable=True)[:free]
    return [1 + int((owner[best] == unit).sum()) for unit in range(len(gains))]

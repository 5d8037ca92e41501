"""Distributing a budget over layers, against every way there is to do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch

from convert.methods.budget import Prospect, distributed
from tests.methods.layers import randn

_HIDDEN = 4
Sizes = Sequence[tuple[int, int]]


def _prospect(seed: int, pairs: Sequence[int], weight: float) -> Prospect:
    """Losses that fall with the pairs, and spectra that then hold less."""
    draws = randn(len(pairs), _HIDDEN, seed=seed).square().cumsum(0).flip(0)
    spectra = draws.sort(1, descending=True).values
    lost = randn(len(pairs), seed=seed + 50).square().cumsum(0).flip(0)
    return Prospect(
        turning=dict(zip(pairs, lost.tolist(), strict=True)),
        spectra=dict(zip(pairs, spectra, strict=True)),
        beyond=dict(zip(pairs, (0.2 * lost).tolist(), strict=True)),
        weight=weight,
    )


def _lost(prospects: Sequence[Prospect], sizes: Sizes) -> float:
    """By definition: what turns in vain, and what a latent leaves out."""
    total = 0.0
    for prospect, (pairs, rank) in zip(prospects, sizes, strict=True):
        left = sum(prospect.spectra[pairs].tolist()[rank:]) + prospect.beyond[pairs]
        total += prospect.weight * (prospect.turning[pairs] + left)
    return total


def _all(prospects: Sequence[Prospect], numbers: int) -> Iterator[Sizes]:
    each = [product(p.turning, range(1, _HIDDEN + 1)) for p in prospects]
    for sizes in product(*each):
        if sum(2 * pairs + rank for pairs, rank in sizes) <= numbers:
            yield sizes


@pytest.mark.parametrize("numbers", [3, 5, 8, 12])
@pytest.mark.parametrize("seed", range(4))
def test_no_ranks_lose_less(seed: int, numbers: int) -> None:
    prospects = [_prospect(seed + n, [0], 1 + n) for n in range(3)]
    found = distributed(prospects, numbers, start=[0, 0, 0])
    best = min(_lost(prospects, sizes) for sizes in _all(prospects, numbers))
    assert _lost(prospects, found) == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert sum(rank for _, rank in found) == numbers
    assert min(rank for _, rank in found) >= 1


@pytest.mark.parametrize("numbers", [6, 9, 13, 20])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_and_ranks_lose_hardly_more_than_the_best(seed: int, numbers: int) -> None:
    prospects = [_prospect(10 * seed + n, [0, 1, 3], 1 + n) for n in range(3)]
    found = distributed(prospects, numbers, start=[1, 0, 0])
    assert sum(2 * pairs + rank for pairs, rank in found) <= numbers
    assert all(rank <= _HIDDEN for _, rank in found)
    lost = [_lost(prospects, sizes) for sizes in _all(prospects, numbers)]
    assert _lost(prospects, found) <= min(lost) + 0.1 * (max(lost) - min(lost))
    equal = [
        _lost(prospects, s) for s in _all(prospects, numbers) if [p for p, _ in s] == [1, 0, 0]
    ]
    assert _lost(prospects, found) <= min(equal) + 1e-12


def test_numbers_that_nothing_can_hold_are_left() -> None:
    prospects = [_prospect(n, [0, 2], 1.0) for n in range(2)]
    assert distributed(prospects, 100, start=[0, 0]) == [(2, _HIDDEN), (2, _HIDDEN)]


def test_what_counts_more_gets_more() -> None:
    alike = [_prospect(3, [0, 1, 2], weight) for weight in (1.0, 1.0, 50.0)]
    sizes = [2 * pairs + rank for pairs, rank in distributed(alike, 9, start=[0, 0, 0])]
    assert sizes[2] > max(sizes[:2])
    assert abs(sizes[0] - sizes[1]) <= 2


def test_a_prospect_says_what_it_was_told() -> None:
    prospect = Prospect(
        {0: 5.0, 2: 1.0}, {0: torch.tensor([4.0, 2.0]), 2: torch.ones(2)}, {0: 0.0, 2: 0.5}, 0.5
    )
    assert [prospect.lost(0, rank) for rank in range(3)] == [5.5, 3.5, 2.5]
    assert prospect.lost(2, 1) == 1.25
    assert [prospect.nearest(pairs) for pairs in (0, 1, 2, 9)] == [0, 1, 2, 2]

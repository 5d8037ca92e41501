"""Which components stay rotary, against every choice that there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from convert.methods.attended import Attended
from convert.methods.cut import Selection, kept_components, lost_without_turn
from tests.helpers import assert_close
from tests.methods.layers import randn

P, COUNT = 4, 2
Allowed = Callable[[Sequence[int]], bool]  # of numbers of components of each plane


def _lost(seed: int, planes: int = P) -> Tensor:
    return (1.5 * randn(planes, COUNT, seed=seed)).exp()


def _counts(chosen: Sequence[int]) -> list[int]:
    """Components of each plane, for chosen flat indices."""
    return [sum(index // COUNT == plane for index in chosen) for plane in range(P)]


def _most(lost: Tensor, pairs: int, allowed: Allowed) -> float:
    """The most that any allowed choice of components keeps."""
    return max(
        float(lost.flatten()[list(chosen)].sum())
        for chosen in combinations(range(lost.numel()), pairs)
        if allowed(_counts(chosen))
    )


def _once(counts: Sequence[int]) -> bool:
    return max(counts) <= 1


def _strided(pairs: int) -> Allowed:
    step = P // pairs
    planes = {step * i for i in range(pairs)}
    return lambda counts: {p for p, count in enumerate(counts) if count} == planes


def _allowed(selection: Selection, pairs: int) -> Allowed:
    rules: dict[Selection, Allowed] = {
        "greedy": lambda _: True,
        "per-frequency": _once,
        "stride": _strided(pairs),
    }
    return rules[selection]


CASES = [
    *(("greedy", pairs) for pairs in range(1, P * COUNT + 1)),
    *(("per-frequency", pairs) for pairs in range(1, P + 1)),
    *(("stride", pairs) for pairs in range(1, P + 1)),
]
cases = pytest.mark.parametrize(("selection", "pairs"), CASES)


@cases
@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_a_layer_keeps_more(selection: Selection, pairs: int, seed: int) -> None:
    lost = _lost(seed)
    (kept,) = kept_components([lost], pairs, selection, common=False)
    assert kept.dtype == torch.bool
    assert int(kept.sum()) == pairs
    allowed = _allowed(selection, pairs)
    assert allowed(kept.sum(1).tolist())
    assert float(lost[kept].sum()) == pytest.approx(_most(lost, pairs, allowed), rel=1e-12)


@cases
@pytest.mark.parametrize("seed", range(3))
def test_layers_choose_for_themselves_unless_they_share_a_table(
    selection: Selection, pairs: int, seed: int
) -> None:
    layers = [_lost(10 * seed + layer) * 10**layer for layer in range(3)]
    alone = [kept_components([lost], pairs, selection, common=False)[0] for lost in layers]
    for kept, expected in zip(
        kept_components(layers, pairs, selection, common=False), alone, strict=True
    ):
        assert torch.equal(kept, expected)


@cases
@pytest.mark.parametrize("seed", range(3))
def test_no_common_table_keeps_more(selection: Selection, pairs: int, seed: int) -> None:
    """Every layer counts alike, whatever the size of its energy."""
    layers = [_lost(10 * seed + layer) * 10**layer for layer in range(3)]
    chosen = kept_components(layers, pairs, selection, common=True)
    counts = [kept.sum(1).tolist() for kept in chosen]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) == pairs
    allowed = _allowed(selection, pairs)
    assert allowed(counts[0])

    shares = [lost / lost.sum() for lost in layers]

    def best(wanted: Sequence[int]) -> float:
        return sum(_most(share, pairs, lambda c: list(c) == list(wanted)) for share in shares)

    tables = [
        table
        for table in product(range(COUNT + 1), repeat=P)
        if sum(table) == pairs and allowed(table)
    ]
    found = sum(float(share[kept].sum()) for share, kept in zip(shares, chosen, strict=True))
    assert found == pytest.approx(max(map(best, tables)), rel=1e-12)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("selection", ["greedy", "per-frequency", "stride"])
def test_layers_without_positions_are_passed_over(selection: Selection, common: bool) -> None:
    nothing, lost = torch.zeros(0, COUNT, dtype=torch.float64), _lost(1)
    first, kept, last = kept_components([nothing, lost, nothing], 2, selection, common=common)
    assert first.shape == last.shape == (0, COUNT)
    assert first.dtype == last.dtype == torch.bool
    assert torch.equal(kept, kept_components([lost], 2, selection, common=common)[0])
    (only,) = kept_components([nothing], 2, selection, common=common)
    assert only.shape == (0, COUNT)


@pytest.mark.parametrize("selection", ["greedy", "per-frequency", "stride"])
def test_a_layer_that_loses_nothing_has_as_many_pairs_and_no_say(selection: Selection) -> None:
    """A layer whose queries are all zero, say."""
    dead, lost = torch.zeros(P, COUNT, dtype=torch.float64), _lost(3)
    (alone,) = kept_components([dead], 2, selection, common=False)
    assert int(alone.sum()) == 2
    assert _allowed(selection, 2)(alone.sum(1).tolist())
    idle, kept = kept_components([dead, lost], 2, selection, common=True)
    assert torch.equal(kept, kept_components([lost], 2, selection, common=True)[0])
    assert torch.equal(idle.sum(1), kept.sum(1))


def test_lost_energy_is_what_is_left_of_the_turn() -> None:
    """The best constant for a random unit number u of mean m leaves ``E|u - m|^2 = 1 - |m|^2``."""
    heads, samples = 3, 50
    energy = _lost(1).expand(heads, P, COUNT) * torch.tensor([1.0, 2.0, 0.0]).view(-1, 1, 1)
    angle = randn(samples, heads, P, COUNT, seed=4)
    turns = torch.polar(torch.ones_like(angle), angle)
    mean = turns.mean(0)
    nothing = torch.zeros(heads, 0, 0, dtype=torch.float64)
    found = lost_without_turn(Attended(energy, mean, nothing, nothing))
    left = (turns - mean).abs().square().mean(0)
    assert_close(found, (energy * left).sum(0), atol=1e-12 * float(energy.max()))
    other = (turns - (mean + 0.01)).abs().square().mean(0)
    assert bool((found < (energy * other).sum(0)).all())

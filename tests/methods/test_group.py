"""Grouping against every partition there is, on layers small enough to try them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import pytest
import torch

from convert.layer import AttentionLayer
from convert.methods.group import adjacent, similar
from convert.methods.merge import Inputs, merge_heads, moments_of
from tests.methods.layers import Shape, correlated, inputs_of, partitions, random_layer

Partition = Sequence[Sequence[int]]


def _unit(kv_heads: int, seed: int, *, count: int = 1, group: int = 2) -> list[AttentionLayer]:
    shape = Shape(kv_heads=kv_heads, group=group, head_dim=4, value_dim=4, hidden=12, rope_dim=2)
    return [random_layer(shape, seed=seed + 50 * layer) for layer in range(count)]


def _inputs(count: int, seed: int) -> Inputs:
    return inputs_of(correlated(count, 60, 12, seed=seed))


def _cost(layers: Sequence[AttentionLayer], groups: Partition, inputs: Inputs | None) -> float:
    """Cost of a partition: lost shares of what merging can lose, the predicted energy."""
    losses = merge_heads(layers, groups, inputs)[1].values()
    unpredicted = moments_of(layers, inputs)
    shares = []
    for loss, missing in zip(
        losses, (unpredicted.key_unpredicted, unpredicted.value_unpredicted), strict=True
    ):
        shares.append(float((loss.lost - missing).sum() / (loss.total - missing).sum()))
    return sum(shares)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_the_best_of_all_partitions(seed: int) -> None:
    layers = _unit(6, seed)
    found = similar(moments_of(layers, None), 3)
    best = min(_cost(layers, groups, None) for groups in partitions(tuple(range(6)), 2))
    assert _cost(layers, found, None) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_layers_that_share_pair_as_in_the_best_assignment(seed: int, calibrated: bool) -> None:
    layers = _unit(5, seed, count=2)
    inputs = _inputs(2, seed) if calibrated else None
    found = similar(moments_of(layers, inputs), 5)
    assignments = ([(i, 5 + j) for i, j in enumerate(order)] for order in permutations(range(5)))
    best = min(_cost(layers, groups, inputs) for groups in assignments)
    assert _cost(layers, found, inputs) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("kv_heads", "groups", "count"), [(4, 2, 2), (6, 3, 2), (4, 4, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_groups_have_equally_many_members_of_each_layer(
    kv_heads: int, groups: int, count: int, seed: int
) -> None:
    layers, inputs = _unit(kv_heads, seed, count=count), _inputs(count, seed)
    found = similar(moments_of(layers, inputs), groups)
    assert sorted(member for group in found for member in group) == list(range(count * kv_heads))
    assert found == sorted(tuple(sorted(group)) for group in found)
    for group, layer in product(found, range(count)):
        assert sum(member // kv_heads == layer for member in group) == kv_heads // groups


@pytest.mark.parametrize(
    ("kv_heads", "groups", "count"), [(8, 2, 1), (6, 2, 1), (8, 4, 1), (4, 2, 2), (4, 4, 3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_of_two_heads_loses_less(kv_heads: int, groups: int, count: int, seed: int) -> None:
    layers = _unit(kv_heads, seed, count=count)
    inputs = _inputs(count, seed) if count > 1 else None
    found = similar(moments_of(layers, inputs), groups)
    cost = _cost(layers, found, inputs)
    assert cost <= _cost(layers, adjacent(kv_heads, groups, count), inputs) + 1e-9
    place = {member: index for index, group in enumerate(found) for member in group}
    for a in range(count * kv_heads):
        for b in range(a // kv_heads * kv_heads, a):  # of the same layer
            if place[a] != place[b]:
                swap = {a: b, b: a}
                other = [tuple(swap.get(m, m) for m in group) for group in found]
                assert cost <= _cost(layers, other, inputs) + 2e-9


def test_adjacent_groups_are_neighbours() -> None:
    assert adjacent(6, 2) == [(0, 1, 2), (3, 4, 5)]


def test_adjacent_groups_of_layers_have_the_same_places_in_each() -> None:
    assert adjacent(4, 2, 3) == [(0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)]
    assert adjacent(2, 2, 2) == [(0, 2), (1, 3)]


def test_merged_layer_loses_what_it_says() -> None:
    """Expected value error under unit inputs, written out head by head."""
    (layer,) = _unit(4, 1)
    (merged,), losses = merge_heads([layer], [(0, 2), (1, 3)])
    order = [head for member in (0, 2, 1, 3) for head in (2 * member, 2 * member + 1)]
    assert merged.v is not None
    assert merged.o is not None
    assert layer.v is not None
    assert layer.o is not None
    lost = torch.zeros(4, dtype=torch.float64)
    for place, head in enumerate(order):
        before = layer.o[:, head] @ layer.v[head // 2]
        after = merged.o[:, place] @ merged.v[place // 4]
        lost[head // 2] += (before - after).square().sum()
    assert losses["v"].lost.tolist() == pytest.approx(lost.tolist(), rel=1e-6)

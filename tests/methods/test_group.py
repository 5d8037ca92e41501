"""Grouping against every partition there is, on layers small enough to try them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from convert.layer import AttentionLayer, Geometry, Rope
from convert.methods.group import adjacent, similar
from convert.methods.merge import merge_heads, moments_of

Partition = list[tuple[int, ...]]


def _layer(kv_heads: int, seed: int, group: int = 2) -> AttentionLayer:
    generator = torch.Generator().manual_seed(seed)

    def heads(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, dim, queries = 12, 4, kv_heads * group
    return AttentionLayer(
        geometry=Geometry(
            hidden=hidden, heads=queries, kv_heads=kv_heads, head_dim=dim, value_dim=dim
        ),
        q=heads(queries, dim, hidden),
        k=heads(kv_heads, dim, hidden),
        v=heads(kv_heads, dim, hidden),
        o=heads(hidden, queries, dim),
        rope=Rope(dim=2, interleaved=False, theta=1e4),
    )


def _partitions(members: tuple[int, ...], size: int) -> Iterator[Partition]:
    if not members:
        yield []
        return
    first, *others = members
    from itertools import combinations

    for mates in combinations(others, size - 1):
        left = tuple(m for m in others if m not in mates)
        for rest in _partitions(left, size):
            yield [(first, *mates), *rest]


def _cost(layer: AttentionLayer, groups: Partition) -> float:
    """Cost of a partition from what merging it says it loses."""
    losses = merge_heads(layer, groups)[1]
    return losses["k"].share + losses["v"].share


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_the_best_of_all_partitions(seed: int) -> None:
    layer = _layer(6, seed)
    found = similar(moments_of(layer, None), 3)
    best = min(_cost(layer, groups) for groups in _partitions(tuple(range(6)), 2))
    assert _cost(layer, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("kv_heads", "groups"), [(8, 2), (6, 2), (8, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_of_two_heads_loses_less(kv_heads: int, groups: int, seed: int) -> None:
    layer = _layer(kv_heads, seed)
    found = similar(moments_of(layer, None), groups)
    cost = _cost(layer, found)
    assert cost <= _cost(layer, adjacent(kv_heads, groups)) + 1e-9
    place = {member: index for index, group in enumerate(found) for member in group}
    for a in range(kv_heads):
        for b in range(a):
            if place[a] != place[b]:
                swap = {a: b, b: a}
                other = [tuple(swap.get(m, m) for m in group) for group in found]
                assert cost <= _cost(layer, other) + 2e-9


def test_groups_are_a_partition_in_order() -> None:
    found = similar(moments_of(_layer(8, 0), None), 2)
    assert sorted(member for group in found for member in group) == list(range(8))
    assert found == sorted(tuple(sorted(group)) for group in found)


def test_adjacent_groups_are_neighbours() -> None:
    assert adjacent(6, 2) == [(0, 1, 2), (3, 4, 5)]


def test_merged_layer_loses_what_it_says() -> None:
    """Expected value error under unit inputs, written out head by head."""
    layer = _layer(4, 1)
    merged, losses = merge_heads(layer, [(0, 2), (1, 3)])
    order = [head for member in (0, 2, 1, 3) for head in (2 * member, 2 * member + 1)]
    assert merged.v is not None
    assert merged.o is not None
    assert layer.v is not None
    assert layer.o is not None
    lost = 0.0
    for place, head in enumerate(order):
        before = layer.o[:, head] @ layer.v[head // 2]
        after = merged.o[:, place] @ merged.v[place // 4]
        lost += float((before - after).square().sum())
    assert losses["v"].lost == pytest.approx(lost, rel=1e-6)

"""Pooling of KV heads against exact rational arithmetic; every comparison is for equality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convert.layer import AttentionLayer, Geometry, Rope
from convert.methods.group import adjacent
from convert.methods.merge import merge_heads
from convert.methods.pool import (
    MERGES,
    Merge,
    best_keys,
    first,
    lost_energy,
    mean,
    pool,
    pooling,
)
from tests.helpers import assert_equal
from tests.methods.layers import Shape, random_layer

unhurried = settings(deadline=None)  # a busy machine is no fault
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
dtypes = st.sampled_from(DTYPES)
# integers that every dtype holds exactly; their sums and squares are exact in float32 too
integers = st.integers(-128, 128)


def _rows(
    heads: int, width: int, numbers: st.SearchStrategy[int]
) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(numbers, min_size=width, max_size=width)
    return st.lists(row, min_size=heads, max_size=heads)


@st.composite
def grids(
    draw: st.DrawFn, groups: Sequence[int] = (1, 2, 3, 4, 5, 8)
) -> tuple[list[list[int]], int]:
    """Rows of integers, one for each KV head, and the number of heads to pool them to."""
    kv_heads, group = draw(st.integers(1, 4)), draw(st.sampled_from(groups))
    return draw(_rows(kv_heads * group, draw(st.integers(1, 5)), integers)), kv_heads


def groups_of(rows: list[list[int]], kv_heads: int) -> list[list[list[int]]]:
    size = len(rows) // kv_heads
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def exact_means(rows: list[list[int]], kv_heads: int) -> list[list[Fraction]]:
    return [
        [Fraction(sum(column), len(members)) for column in zip(*members, strict=True)]
        for members in groups_of(rows, kv_heads)
    ]


@unhurried
@given(grids(), dtypes)
def test_mean_is_the_exact_mean_rounded_once(
    grid: tuple[list[list[int]], int], dtype: torch.dtype
) -> None:
    rows, kv_heads = grid
    # no quotient of these integers is so near a rounding boundary that the way over float64
    # could change the result
    expected = [[float(value) for value in row] for row in exact_means(rows, kv_heads)]
    expected_tensor = torch.tensor(expected, dtype=torch.float64).to(dtype)
    assert_equal(mean([torch.tensor(rows, dtype=dtype)], kv_heads), expected_tensor)


def finite(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Numbers of a dtype, subnormal ones too.

    Those of bfloat16 end at 2**120: its range is that of float32, in which 128 of them are added.
    """
    if dtype == torch.bfloat16:
        numbers = st.floats(-(2.0**120), 2.0**120, width=32)
        return numbers.map(lambda x: float(torch.tensor(x).to(torch.bfloat16)))
    width = 16 if dtype == torch.float16 else 32
    return st.floats(width=width, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@unhurried
@given(data=st.data())
def test_mean_of_copies_is_the_copy(dtype: torch.dtype, data: st.DataObject) -> None:
    group, heads = data.draw(st.integers(1, 128)), data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(finite(dtype), min_size=heads, max_size=heads))
    distinct = torch.tensor(rows, dtype=torch.float64).to(dtype)[:, None]
    assert_equal(mean([distinct.repeat_interleave(group, 0)], heads), distinct)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@unhurried
@given(data=st.data())
def test_mean_never_leaves_the_range_of_its_group(dtype: torch.dtype, data: st.DataObject) -> None:
    # holds whatever is drawn: the ends are representable, and rounding is monotone
    values = data.draw(st.lists(finite(dtype), min_size=1, max_size=64))
    heads = torch.tensor(values, dtype=torch.float64).to(dtype)[:, None]
    (pooled,) = mean([heads], 1).flatten()
    assert heads.min() <= pooled <= heads.max()


@pytest.mark.parametrize("merge", MERGES)
@unhurried
@given(grid=grids(), dtype=dtypes)
def test_groups_of_one_stay_as_they_are(
    merge: Merge, grid: tuple[list[list[int]], int], dtype: torch.dtype
) -> None:
    heads = torch.tensor(grid[0], dtype=dtype)
    assert_equal(MERGES[merge]([heads], len(heads)), heads)


@unhurried
@given(grids())
def test_first_picks_the_first_head_of_each_group(grid: tuple[list[list[int]], int]) -> None:
    rows, kv_heads = grid
    expected = [members[0] for members in groups_of(rows, kv_heads)]
    pooled = first([torch.tensor(rows, dtype=torch.float32)], kv_heads)
    assert pooled.tolist() == expected
    assert pooled.is_contiguous()


@pytest.mark.parametrize("merge", MERGES)
@unhurried
@given(grid=grids(groups=(1, 2, 4, 8)), data=st.data())
def test_pooling_is_linear(
    merge: Merge, grid: tuple[list[list[int]], int], data: st.DataObject
) -> None:
    rows, kv_heads = grid
    other = data.draw(_rows(len(rows), len(rows[0]), integers))
    # groups of a power of two keep every mean exact, so linearity is equality
    a, b = (torch.tensor(values, dtype=torch.float32) for values in (rows, other))
    merged = MERGES[merge]
    sum_of_merges = merged([a], kv_heads) + 2 * merged([b], kv_heads)
    assert_equal(merged([a + 2 * b], kv_heads), sum_of_merges)


def exact_losses(rows: list[list[int]], pooled: list[list[Fraction]]) -> list[tuple[Fraction, Any]]:
    """Total and lost energy of each head."""
    return [
        (
            Fraction(sum(x * x for x in row)),
            sum((x - y) ** 2 for x, y in zip(row, merged, strict=True)),
        )
        for members, merged in zip(groups_of(rows, len(pooled)), pooled, strict=True)
        for row in members
    ]


def exact_share(losses: Sequence[tuple[Fraction, Any]]) -> float:
    total = sum(part for part, _ in losses)
    return float(sum(lost for _, lost in losses) / total) if total else 0.0


@unhurried
@given(grids(groups=(1, 2, 4, 8)), dtypes, st.data())
def test_lost_energy_is_that_of_the_definition(
    grid: tuple[list[list[int]], int], dtype: torch.dtype, data: st.DataObject
) -> None:
    rows, kv_heads = grid
    # at most 160 squares below 2**16: sums stay under 2**24 and are exact in float32
    pooled = data.draw(_rows(kv_heads, len(rows[0]), integers))
    expected = exact_losses(rows, [[Fraction(x) for x in row] for row in pooled])
    heads, merged = (torch.tensor(values, dtype=dtype) for values in (rows, pooled))
    loss = lost_energy(heads, merged)
    assert loss.total.tolist() == [float(total) for total, _ in expected]
    assert loss.lost.tolist() == [float(lost) for _, lost in expected]
    assert loss.share == exact_share(expected)
    assert loss.shares == [exact_share([head]) for head in expected]
    # a share: the unit cancels
    assert lost_energy(heads / 4096, merged / 4096).share == loss.share


@unhurried
@given(grids(groups=(1, 2, 4, 8)))
def test_mean_loses_least_and_never_more_than_all(grid: tuple[list[list[int]], int]) -> None:
    rows, kv_heads = grid
    heads = torch.tensor(rows, dtype=torch.float32)
    lost = lost_energy(heads, mean([heads], kv_heads)).share
    assert lost == exact_share(exact_losses(rows, exact_means(rows, kv_heads)))
    assert 0 <= lost <= 1
    assert lost <= lost_energy(heads, first([heads], kv_heads)).share


@pytest.mark.parametrize("group", [2, 4, 8])
def test_unrelated_heads_keep_one_part_in_their_number(group: int) -> None:
    heads = torch.eye(2 * group)
    assert lost_energy(heads, mean([heads], 2)).share == (group - 1) / group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_heads_lose_nothing(dtype: torch.dtype) -> None:
    heads = torch.zeros(4, 3, dtype=dtype)
    loss = lost_energy(heads, mean([heads], 2))
    assert loss.share == 0.0
    assert loss.shares == [0.0] * 4


def _numbers(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)


def _layer(start: int = 0) -> AttentionLayer:
    """H 8, Hkv 4, D 2, Dv 3, E 5; every field is there and every number is another."""
    shapes = {
        "q": (8, 2, 5),
        "k": (4, 2, 5),
        "v": (4, 3, 5),
        "o": (5, 8, 3),
        "q_bias": (8, 2),
        "k_bias": (4, 2),
        "v_bias": (4, 3),
        "o_bias": (5,),
        "q_norm": (8, 2),
        "k_norm": (4, 2),
        "k_norm_bias": (4, 2),
    }
    fields = {
        name: _numbers(*shape, start=start + 100 * i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    geometry = Geometry(hidden=5, heads=8, kv_heads=4, head_dim=2, value_dim=3)
    return AttentionLayer(geometry=geometry, **fields)


@pytest.fixture
def layer() -> AttentionLayer:
    return _layer()


KV_FIELDS = ("k", "v", "k_bias", "v_bias", "k_norm", "k_norm_bias")
OTHERS = ("q", "o", "q_bias", "o_bias", "q_norm")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pool_merges_every_kv_field_and_nothing_else(layer: AttentionLayer, kv_heads: int) -> None:
    (pooled,) = pool([layer], kv_heads=kv_heads, merge="mean")
    assert pooled.geometry == dataclasses.replace(layer.geometry, kv_heads=kv_heads)
    for name in KV_FIELDS:
        heads = getattr(layer, name)
        expected = torch.stack([sum(part) / len(part) for part in heads.chunk(kv_heads)])
        assert_equal(getattr(pooled, name), expected)
    for name in OTHERS:
        assert getattr(pooled, name) is getattr(layer, name)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("merge", MERGES)
def test_layers_that_share_have_the_keys_and_values_of_the_first(
    merge: Merge, kv_heads: int
) -> None:
    # multiples of a power of two, and four layers: every mean is exact
    layers = [_layer(start=1024 * index) for index in range(4)]
    pooled = pool(layers, kv_heads=kv_heads, merge=merge)
    for name in KV_FIELDS:
        grouped = [getattr(item, name).chunk(kv_heads) for item in layers]
        expected = [
            torch.cat([of_layer[group] for of_layer in grouped]).mean(0)
            if merge == "mean"
            else grouped[0][group][0]
            for group in range(kv_heads)
        ]
        assert_equal(getattr(pooled[0], name), torch.stack(expected))
        assert all(getattr(consumer, name) is None for consumer in pooled[1:])
    for before, after in zip(layers, pooled, strict=True):
        assert after.geometry == dataclasses.replace(before.geometry, kv_heads=kv_heads)
        assert all(getattr(after, name) is getattr(before, name) for name in OTHERS)


def test_norm_that_the_heads_share_stays(layer: AttentionLayer) -> None:
    shared = dataclasses.replace(layer, k_norm=_numbers(2))
    assert_equal(pool([shared], kv_heads=1, merge="mean")[0].k_norm, _numbers(2))


def test_norms_that_the_heads_of_each_layer_share_become_their_mean(layer: AttentionLayer) -> None:
    norms = [_numbers(2, start=start) for start in (0, 6)]
    layers = [dataclasses.replace(layer, k_norm=norm) for norm in norms]
    assert_equal(pool(layers, kv_heads=2, merge="mean")[0].k_norm, _numbers(2, start=3))
    assert_equal(pool(layers, kv_heads=2, merge="first")[0].k_norm, norms[0])


def test_fields_that_are_not_there_stay_away(layer: AttentionLayer) -> None:
    bare = AttentionLayer(geometry=layer.geometry, k=layer.k, v=layer.v)
    (pooled,) = pool([bare], kv_heads=2, merge="first")
    present = {
        field.name
        for field in dataclasses.fields(pooled)
        if getattr(pooled, field.name) is not None
    }
    assert present == {"geometry", "k", "v"}


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_heads_that_do_not_divide(layer: AttentionLayer, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"{kv_heads} KV heads do not divide 4"):
        pool([layer], kv_heads=kv_heads, merge="mean")


@pytest.mark.parametrize("count", [1, 2])
def test_method_reads_what_it_changes_and_measures_keys_and_values(count: int) -> None:
    layers = [_layer(start=1000 * index) for index in range(count)]
    method = pooling(kv_heads=1, merge="mean")
    pooled, measured = method.convert(layers, None)
    for before, after, outline in zip(layers, pooled, method.outline(layers), strict=True):
        changed = {name for name in "qkvo" if getattr(after, name) is not getattr(before, name)}
        assert changed <= method.reads
        for name in KV_FIELDS:
            expected, found = getattr(after, name), getattr(outline, name)
            assert (None if found is None else found.shape) == (
                None if expected is None else expected.shape
            )
    for part in "kv":
        of_layers = torch.stack([getattr(layer, part) for layer in layers]).double()
        spread = (of_layers - of_layers.mean((0, 1))).square().flatten(2).sum(2)
        power = of_layers.square().flatten(2).sum(2)
        for layer, result in enumerate(measured):
            # the integers are exact, their means are not: a few roundings in float64
            share = float(spread[layer].sum() / power[layer].sum())
            assert result[f"lost_energy_{part}"] == pytest.approx(share, rel=1e-6)
            shares = (spread[layer] / power[layer]).tolist()
            assert result[f"lost_heads_{part}"] == pytest.approx(shares, rel=1e-6)


@pytest.mark.parametrize(
    ("dim", "interleaved"), [(0, False), (4, False), (4, True), (6, False), (6, True)]
)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_best_keys_lose_what_the_merge_loses_where_all_weigh_alike(
    dim: int, interleaved: bool, count: int, kv_heads: int
) -> None:
    """Queries that look for every direction alike weigh all planes and all other dims alike."""
    shape = Shape(kv_heads=4, group=1, head_dim=6, rope_dim=dim, interleaved=interleaved, hidden=9)
    layers = [random_layer(shape, seed=seed) for seed in range(count)]
    groups = adjacent(4, kv_heads, count)
    rows = torch.eye(6, 9, dtype=torch.float64)
    rows[:dim] *= 0.5**0.5  # the energies of the two dims of a plane add up to that of another
    alike = [dataclasses.replace(layer, q=rows.expand(4, -1, -1)) for layer in layers]
    expected = merge_heads(alike, groups)[1]["k"].share
    # the merge lifts its weights by 1e-12 of themselves
    assert best_keys(layers, groups) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_best_keys_of_normed_keys_are_unknown(layer: AttentionLayer) -> None:
    rope = Rope(dim=2, interleaved=False, theta=1e4)
    assert best_keys([dataclasses.replace(layer, rope=rope)], adjacent(4, 2)) is None
    normless = dataclasses.replace(layer, rope=rope, k_norm=None, k_norm_bias=None)
    assert best_keys([normless], adjacent(4, 2)) is not None

"""Pooling of KV heads against exact rational arithmetic; every comparison is for equality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convert.layer import AttentionLayer, Geometry
from convert.methods.pool import MERGES, Merge, first, lost_energy, mean, pool, pooling
from tests.helpers import assert_equal

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
    assert_equal(mean(torch.tensor(rows, dtype=dtype), kv_heads), expected_tensor)


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
    assert_equal(mean(distinct.repeat_interleave(group, 0), heads), distinct)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@unhurried
@given(data=st.data())
def test_mean_never_leaves_the_range_of_its_group(dtype: torch.dtype, data: st.DataObject) -> None:
    # holds whatever is drawn: the ends are representable, and rounding is monotone
    values = data.draw(st.lists(finite(dtype), min_size=1, max_size=64))
    heads = torch.tensor(values, dtype=torch.float64).to(dtype)[:, None]
    (pooled,) = mean(heads, 1).flatten()
    assert heads.min() <= pooled <= heads.max()


@pytest.mark.parametrize("merge", MERGES)
@unhurried
@given(grid=grids(), dtype=dtypes)
def test_groups_of_one_stay_as_they_are(
    merge: Merge, grid: tuple[list[list[int]], int], dtype: torch.dtype
) -> None:
    heads = torch.tensor(grid[0], dtype=dtype)
    assert_equal(MERGES[merge](heads, len(heads)), heads)


@unhurried
@given(grids())
def test_first_picks_the_first_head_of_each_group(grid: tuple[list[list[int]], int]) -> None:
    rows, kv_heads = grid
    expected = [members[0] for members in groups_of(rows, kv_heads)]
    pooled = first(torch.tensor(rows, dtype=torch.float32), kv_heads)
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
    assert_equal(merged(a + 2 * b, kv_heads), merged(a, kv_heads) + 2 * merged(b, kv_heads))


def exact_lost_energy(rows: list[list[int]], pooled: list[list[Fraction]]) -> float:
    lost = total = Fraction(0)
    for members, merged in zip(groups_of(rows, len(pooled)), pooled, strict=True):
        for row in members:
            lost += sum((x - y) ** 2 for x, y in zip(row, merged, strict=True))
            total += sum(x * x for x in row)
    return float(lost / total) if total else 0.0


@unhurried
@given(grids(groups=(1, 2, 4, 8)), dtypes, st.data())
def test_lost_energy_is_that_of_the_definition(
    grid: tuple[list[list[int]], int], dtype: torch.dtype, data: st.DataObject
) -> None:
    rows, kv_heads = grid
    # at most 160 squares below 2**16: sums stay under 2**24 and are exact in float32
    pooled = data.draw(_rows(kv_heads, len(rows[0]), integers))
    expected = exact_lost_energy(rows, [[Fraction(x) for x in row] for row in pooled])
    heads, merged = (torch.tensor(values, dtype=dtype) for values in (rows, pooled))
    assert lost_energy(heads, merged) == expected
    assert lost_energy(heads / 4096, merged / 4096) == expected  # a share: the unit cancels


@unhurried
@given(grids(groups=(1, 2, 4, 8)))
def test_mean_loses_least_and_never_more_than_all(grid: tuple[list[list[int]], int]) -> None:
    rows, kv_heads = grid
    heads = torch.tensor(rows, dtype=torch.float32)
    pooled = mean(heads, kv_heads)
    lost = lost_energy(heads, pooled)
    assert lost == exact_lost_energy(rows, exact_means(rows, kv_heads))
    assert 0 <= lost <= 1
    assert lost <= lost_energy(heads, first(heads, kv_heads))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_unrelated_heads_keep_one_part_in_their_number(group: int) -> None:
    heads = torch.eye(2 * group)
    assert lost_energy(heads, mean(heads, 2)) == (group - 1) / group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_heads_lose_nothing(dtype: torch.dtype) -> None:
    heads = torch.zeros(4, 3, dtype=dtype)
    assert lost_energy(heads, mean(heads, 2)) == 0.0


def _numbers(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)


@pytest.fixture
def layer() -> AttentionLayer:
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
    }
    fields = {
        name: _numbers(*shape, start=100 * i) for i, (name, shape) in enumerate(shapes.items())
    }
    geometry = Geometry(hidden=5, heads=8, kv_heads=4, head_dim=2, value_dim=3)
    return AttentionLayer(geometry=geometry, **fields)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pool_merges_every_kv_field_and_nothing_else(layer: AttentionLayer, kv_heads: int) -> None:
    pooled = pool(layer, kv_heads=kv_heads, merge="mean")
    assert pooled.geometry == dataclasses.replace(layer.geometry, kv_heads=kv_heads)
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        heads = getattr(layer, name)
        expected = torch.stack([sum(part) / len(part) for part in heads.chunk(kv_heads)])
        assert_equal(getattr(pooled, name), expected)
    for name in ("q", "o", "q_bias", "o_bias", "q_norm"):
        assert getattr(pooled, name) is getattr(layer, name)


def test_norm_that_the_heads_share_stays(layer: AttentionLayer) -> None:
    shared = dataclasses.replace(layer, k_norm=_numbers(2))
    assert pool(shared, kv_heads=1, merge="mean").k_norm is shared.k_norm


def test_fields_that_are_not_there_stay_away(layer: AttentionLayer) -> None:
    bare = AttentionLayer(geometry=layer.geometry, k=layer.k, v=layer.v)
    pooled = pool(bare, kv_heads=2, merge="first")
    present = {
        field.name
        for field in dataclasses.fields(pooled)
        if getattr(pooled, field.name) is not None
    }
    assert present == {"geometry", "k", "v"}


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_heads_that_do_not_divide(layer: AttentionLayer, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"{kv_heads} KV heads do not divide 4"):
        pool(layer, kv_heads=kv_heads, merge="mean")


def test_method_reads_what_it_changes_and_measures_keys_and_values(layer: AttentionLayer) -> None:
    method = pooling(kv_heads=1, merge="mean")
    pooled, measured = method.convert(layer)
    changed = {name for name in "qkvo" if getattr(pooled, name) is not getattr(layer, name)}
    assert changed <= method.reads
    outline = method.outline(layer)
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        assert getattr(outline, name).shape == getattr(pooled, name).shape
    for part in "kv":
        heads = getattr(layer, part).double()
        spread = heads - heads.mean(0)
        expected = float(spread.square().sum() / heads.square().sum())
        # the integers are exact, their means are not: a few roundings in float64
        assert measured[f"lost_energy_{part}"] == pytest.approx(expected, rel=1e-6)

"""Sharing plans against plans written out by hand, and against all plans there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from convert.facts import ModelFacts, read_facts
from convert.sharing import best_plan, can_share, groups_up_to, parse_layers, uniform_plan
from kvpatch.errors import UsageError

_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 50,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _facts(layers: int) -> ModelFacts:
    return read_facts({**_SIZES, "model_type": "llama", "num_hidden_layers": layers})


def _windowed(kinds: Sequence[bool]) -> ModelFacts:
    """Layers that see a window, where true, or everything."""
    return read_facts(
        {
            **_SIZES,
            "model_type": "qwen2",
            "num_hidden_layers": len(kinds),
            "sliding_window": 4,
            "use_sliding_window": True,
            "layer_types": [_SLIDING if kind else _FULL for kind in kinds],
        }
    )


@pytest.mark.parametrize(
    ("layers", "share", "span", "expected"),
    [
        (6, 2, (0, 6), (0, 0, 2, 2, 4, 4)),
        (6, 3, (0, 6), (0, 0, 0, 3, 3, 3)),
        (5, 2, (0, 5), (0, 1, 1, 3, 3)),  # layer 0, which matters most, shares least
        (7, 3, (0, 7), (0, 1, 1, 1, 4, 4, 4)),
        (8, 3, (0, 8), (0, 0, 2, 2, 2, 5, 5, 5)),
        (6, 2, (2, 6), (0, 1, 2, 2, 4, 4)),
        (7, 2, (2, 5), (0, 1, 2, 3, 3, 5, 6)),
        (4, 8, (0, 4), (0, 0, 0, 0)),
        (4, 4, (1, 3), (0, 1, 1, 3)),
        (3, 1, (0, 3), (0, 1, 2)),
    ],
)
def test_uniform_groups(
    layers: int, share: int, span: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert uniform_plan(_facts(layers), share, *span) == expected


@hypothesis_settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.data())
def test_uniform_plans_have_full_groups_after_the_first(
    layers: int, share: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, layers - 2))
    end = data.draw(st.integers(first + 2, layers))
    plan = uniform_plan(_facts(layers), share, first, end)
    assert plan[:first] == tuple(range(first))
    assert plan[end:] == tuple(range(end, layers))
    producers = sorted(set(plan[first:end]))
    assert len(producers) == -(-(end - first) // share)
    sizes = [plan.count(producer) for producer in producers]
    assert sizes[1:] == [share] * (len(sizes) - 1)
    assert 1 <= sizes[0] <= share
    assert all(plan[producer] == producer <= layer for layer, producer in enumerate(plan))


def test_neighbours_with_other_windows_do_not_share() -> None:
    facts = _windowed([True, True, False, False, True])
    assert uniform_plan(facts, 2, 0, 4) == (0, 0, 2, 2, 4)
    with pytest.raises(UsageError, match="layers 1 and 2 of this model cannot share") as caught:
        uniform_plan(facts, 2, 1, 5)
    assert "--layers auto" in str(caught.value.hint)
    with pytest.raises(UsageError, match="layers 1 and 2") as caught:
        uniform_plan(facts, 2, 1, 5, auto=False)
    assert "auto" not in str(caught.value.hint)
    assert can_share(facts, 0, 4)
    assert not can_share(facts, 0, 2)


def test_neighbours_with_other_positions_do_not_share() -> None:
    smollm = {**_SIZES, "model_type": "smollm3", "num_hidden_layers": 4}
    facts = read_facts({**smollm, "no_rope_layers": [1, 1, 0, 1]})
    assert can_share(facts, 0, 1)
    with pytest.raises(UsageError, match=r"layers 2 and 3 .* other positions"):
        uniform_plan(facts, 2, 0, 4)
    gemma = {**_SIZES, "model_type": "gemma3_text", "num_hidden_layers": 2, "head_dim": 8}
    local = read_facts({**gemma, "layer_types": [_SLIDING, _FULL], "sliding_window": 64})
    with pytest.raises(UsageError, match="layers 0 and 1"):
        uniform_plan(local, 2, 0, 2)


def test_groups_are_neighbours_of_one_kind() -> None:
    facts = _windowed([True, True, False, False, False])
    assert sorted(groups_up_to(facts, 2)) == [(0, 2), (2, 4), (3, 5)]
    assert sorted(groups_up_to(facts, 4)) == [(0, 2), (2, 4), (2, 5), (3, 5)]


def _compositions(layers: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut layers into groups of neighbours, as (first, end)."""
    for cuts in range(2 ** (layers - 1)):
        bounds = [0, *(i + 1 for i in range(layers - 1) if cuts >> i & 1), layers]
        yield list(pairwise(bounds))


@st.composite
def _priced(draw: st.DrawFn) -> tuple[list[bool], int, dict[tuple[int, int], float]]:
    """Kinds of up to 8 layers, the largest group, and a loss for each group there may be."""
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=8))
    largest = draw(st.integers(1, 8))
    groups = groups_up_to(_windowed(kinds), largest)
    # integers add up exactly, whatever the order
    prices = st.lists(st.integers(0, 40), min_size=len(groups), max_size=len(groups))
    return kinds, largest, dict(zip(groups, map(float, draw(prices)), strict=True))


@hypothesis_settings(deadline=None, max_examples=200)
@given(_priced(), st.integers(1, 8))
def test_best_plan_is_the_best_of_all_plans(
    priced: tuple[list[bool], int, dict[tuple[int, int], float]], producers: int
) -> None:
    kinds, largest, losses = priced
    facts = _windowed(kinds)

    def cost(groups: Sequence[tuple[int, int]]) -> float:
        return sum(losses[first, end] for first, end in groups if end - first > 1)

    possible = [
        groups
        for groups in _compositions(len(kinds))
        if len(groups) == producers
        and all(end - first <= largest for first, end in groups)
        and all(len(set(kinds[first:end])) == 1 for first, end in groups)
    ]
    if not possible:
        with pytest.raises(UsageError, match=f"no plan keeps .* {producers} of the {len(kinds)}"):
            best_plan(facts, losses, producers)
        return
    plan = best_plan(facts, losses, producers)
    starts = sorted(set(plan))
    assert starts[0] == 0
    assert len(starts) == producers
    found = list(zip(starts, [*starts[1:], len(kinds)], strict=True))
    assert list(plan) == [first for first, end in found for _ in range(first, end)]
    assert found in possible
    assert cost(found) == min(map(cost, possible))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:8", (0, 8)), ("2:5", (2, 5)), (":3", (0, 3)), ("3:", (3, 8)), (":", (0, 8))],
)
def test_ranges_of_layers(text: str, expected: tuple[int, int]) -> None:
    assert parse_layers(text, 8) == expected


@pytest.mark.parametrize(
    "text", ["", "3", "5:5", "5:2", "0:9", "8:", "-1:4", "a:b", "1:2:3", "1.0:2", "²:4", "0:-1"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no range of the 8 layers") as caught:
        parse_layers(text, 8)
    assert f"--layers {text} " in str(caught.value)
    assert str(caught.value.hint) == "Give --layers FIRST:END such as 0:8, or auto."
    with pytest.raises(UsageError) as caught:
        parse_layers(text, 8, auto=False)
    assert str(caught.value.hint) == "Give --layers FIRST:END such as 0:8."


def test_a_single_layer_has_none_to_share_with() -> None:
    with pytest.raises(UsageError, match="--layers 2:3 is one layer"):
        uniform_plan(_facts(6), 2, 2, 3)


def test_layers_on_their_own_can_lose_too() -> None:
    """Fewer KV heads cost a single layer as well: grouping 1 and 2 is then the cheapest."""
    losses = {(0, 1): 5.0, (1, 2): 1.0, (2, 3): 1.0, (0, 2): 6.0, (1, 3): 2.5}
    assert best_plan(_facts(3), losses, 2) == (0, 0, 2)
    assert best_plan(_facts(3), losses | {(1, 3): 1.5}, 2) == (0, 1, 1)

"""Learning rates by step, and what a curve says."""

from __future__ import annotations

import pytest

from convert.training.curve import Point, tokens_to_recover
from convert.training.schedule import Decay, rate


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("begin", [0, 30])
def test_rates_rise_then_fall_and_never_leave_a_step_untrained(decay: Decay, begin: int) -> None:
    rates = [rate(step, 100, warmup=0.1, decay=decay, begin=begin) for step in range(100)]
    assert rates[:begin] == [0.0] * begin
    assert all(0 < factor <= 1 for factor in rates[begin:])
    rising = rates[begin : begin + 10]
    assert rising == sorted(rising)
    falling = rates[begin + 10 :]
    assert falling == sorted(falling, reverse=True)
    assert (rates[-1] == 1.0) == (decay == "constant")
    if not begin:
        assert max(rates) == rates[9] == 1.0


def test_half_way_down() -> None:
    assert rate(59, 100, warmup=0.2, decay="linear") == pytest.approx(41 / 81)
    assert rate(0, 1, warmup=0.5, decay="cosine") == 1.0


def _curve(*points: tuple[int, float]) -> list[Point]:
    return [Point(tokens=tokens, rate=0.0, eval_kl=kl) for tokens, kl in points]


def test_a_power_law_is_read_on() -> None:
    curve = _curve((0, 2.0), *((n, 2.0 * n**-0.25) for n in (100, 200, 300, 400)))
    assert tokens_to_recover(curve, 0.9) == pytest.approx(10_000, abs=2)


def test_what_is_reached_already_is_known() -> None:
    assert tokens_to_recover(_curve((0, 2.0), (10, 0.5), (20, 0.1), (30, 0.05))) == 20


@pytest.mark.parametrize(
    "points",
    [
        ((0, 2.0), (10, 1.0)),
        ((0, 2.0), (10, 2.1), (20, 2.2)),
        ((0, 2.0), (10, 1.9), (20, 1.8999)),
    ],
)
def test_nothing_is_said_where_nothing_is_known(points: tuple[tuple[int, float], ...]) -> None:
    assert tokens_to_recover(_curve(*points)) is None

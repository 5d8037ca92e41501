"""Complex mixing: nothing is lost, and no order of keys by real mixing carries more."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.mixing import Mixed, Rows, mixture, query_energy, rows_of
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, correlated, inputs_of, randn, random_layer
from tests.methods.references import frequencies, heads_of, original_scores, pairs_of

SAMPLES = 9
SHAPES = {
    "MHA": Shape(kv_heads=4, group=1),
    "GQA": Shape(kv_heads=3, group=2, biases=("q", "k", "v")),
    "MQA": Shape(kv_heads=1, group=4, biases=("k",)),
    "full": Shape(rope_dim=6, biases=("q",)),
    "interleaved": Shape(interleaved=True, biases=("q", "k")),
    "NoPE": Shape(rope_dim=0, biases=("q", "k")),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ROTARY = {name: shape for name, shape in SHAPES.items() if shape.rope_dim}
rotary = pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)


def _inputs(shape: Shape, seed: int = 5) -> Tensor:
    return correlated(1, SAMPLES, shape.hidden, seed=seed)[0]


def _weights(layer: AttentionLayer, seed: int = 6) -> Tensor:
    """[Hkv, P] of very different sizes."""
    assert layer.rope is not None
    return (2 * randn(layer.geometry.kv_heads, layer.rope.dim // 2, seed=seed)).exp()


def _mixed(layer: AttentionLayer, inputs: Tensor, weights: Tensor) -> tuple[Rows, Mixed]:
    rows = rows_of(layer)
    return rows, mixture(rows, inputs_of([inputs]).own[0], weights).of(rows)


def _turning(layer: AttentionLayer, part: str, inputs: Tensor) -> Tensor:
    """The planes of heads as complex numbers [T, n, P]."""
    heads = heads_of(layer, part, inputs)
    return torch.stack(
        [torch.complex(heads[..., i], heads[..., j]) for i, j in pairs_of(layer)], -1
    )


def _components(found: Mixed, inputs: Tensor) -> Tensor:
    """[T, P, n]."""
    return torch.einsum("pne,te->tpn", found.rows, augmented(inputs).to(torch.complex128))


@shapes
def test_rows_are_the_projections_with_planes_side_by_side(shape: Shape) -> None:
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    rows = rows_of(layer)
    order = [dim for pair in pairs_of(layer) for dim in pair]
    order += range(shape.rope_dim, shape.head_dim)
    for part, dims in (("q", order), ("k", order), ("v", list(range(shape.value_dim)))):
        found = torch.einsum("nde,te->tnd", getattr(rows, part), augmented(inputs))
        assert_close(found, heads_of(layer, part, inputs)[..., dims], atol=1e-12)
    assert rows.planes == shape.rope_dim // 2


@rotary
def test_keys_come_back_from_components(shape: Shape) -> None:
    """For any input, not only for those that were measured."""
    layer = random_layer(shape, seed=1)
    _, found = _mixed(layer, _inputs(shape), _weights(layer))
    other = randn(20, shape.hidden, seed=8)
    keys = torch.einsum("gpj,tpj->tgp", found.maps, _components(found, other))
    expected = _turning(layer, "k", other)
    assert_close(torch.view_as_real(keys), torch.view_as_real(expected), atol=1e-10)


@rotary
def test_components_are_uncorrelated_and_have_power_one(shape: Shape) -> None:
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    _, found = _mixed(layer, inputs, _weights(layer))
    parts = _components(found, inputs)
    covariance = torch.einsum("tpi,tpj->pij", parts, parts.conj()) / SAMPLES
    expected = torch.eye(shape.kv_heads, dtype=covariance.dtype).expand_as(covariance)
    assert_close(torch.view_as_real(covariance), torch.view_as_real(expected.clone()), atol=1e-7)


@rotary
def test_energies_are_sorted_and_sum_to_that_of_the_keys(shape: Shape) -> None:
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    weights = _weights(layer)
    _, found = _mixed(layer, inputs, weights)
    power = _turning(layer, "k", inputs).abs().square().mean(0)
    expected = (weights * power).sum(0)
    assert bool((found.energy[:, 1:] <= found.energy[:, :-1]).all())
    assert_close(found.energy.sum(-1), expected, atol=1e-9 * float(expected.sum() + 1))
    # one by one: what a component of power one adds to the keys of all heads
    carried = torch.einsum("gp,gpj->pj", weights, found.maps.abs().square())
    assert_close(found.energy, carried, atol=1e-9 * float(expected.sum() + 1))


@rotary
def test_query_energy_is_the_mean_over_inputs(shape: Shape) -> None:
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    found = query_energy(rows_of(layer), inputs_of([inputs]).own[0])
    expected = _turning(layer, "q", inputs).abs().square().mean(0)
    assert_close(found, expected, atol=1e-10)


@shapes
@pytest.mark.parametrize("own", [True, False], ids=["components", "random"])
def test_scores_stay_if_queries_take_up_the_inverse(shape: Shape, own: bool) -> None:
    """Components turn as real pairs; every query head reads all of them through real matrices.

    That holds for the components found and for any invertible complex mixing of the heads.
    """
    layer, inputs, count = random_layer(shape, seed=1), _inputs(shape), shape.kv_heads
    rows, found = _mixed(layer, inputs, _weights(layer))
    if not own:
        real, imaginary = randn(2, rows.planes, count, count, seed=9)
        mixing = torch.complex(real, imaginary)
        found = dataclasses.replace(
            found,
            rows=torch.einsum("pjg,gpe->pje", mixing, rows.turning_k),
            maps=torch.linalg.inv(mixing).transpose(0, 1),
        )
    speeds, parts = frequencies(rows.planes), _components(found, inputs)
    heads = heads_of(layer, "q", inputs)
    scores = torch.einsum(
        "thd,shd->hts",
        heads[..., shape.rope_dim :],
        heads_of(layer, "k", inputs).repeat_interleave(shape.group, 1)[..., shape.rope_dim :],
    )
    for head in range(layer.geometry.heads):
        for plane, (i, j) in enumerate(pairs_of(layer)):
            for component in range(count):
                turn = found.maps[head // shape.group, plane, component]
                block = torch.tensor([[turn.real, -turn.imag], [turn.imag, turn.real]])
                query = heads[:, head, [i, j]] @ block.double()  # its transpose, on the left
                key = torch.view_as_real(parts[:, plane, component])
                scores[head] += _turned(query, speeds[plane]) @ _turned(key, speeds[plane]).T
    expected = original_scores(layer, inputs, speeds, 1.0)
    assert_close(scores, expected, atol=1e-10 * float(expected.abs().max()))


def _turned(pairs: Tensor, speed: Tensor) -> Tensor:
    angle = torch.arange(len(pairs)) * speed
    first = angle.cos() * pairs[:, 0] - angle.sin() * pairs[:, 1]
    second = angle.sin() * pairs[:, 0] + angle.cos() * pairs[:, 1]
    return torch.stack([first, second], 1)


def _sums(values: Tensor) -> Tensor:
    """Of the first m entries, the largest first."""
    return values.sort(-1, descending=True).values.cumsum(-1)


def _covariance(layer: AttentionLayer, inputs: Tensor, weights: Tensor) -> Tensor:
    """[P, Hkv, Hkv] of the weighted keys, from samples."""
    keys = weights.sqrt() * _turning(layer, "k", inputs)
    return torch.einsum("tgp,thp->pgh", keys, keys.conj()) / len(inputs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), kv_heads=st.integers(1, 6), biased=st.booleans())
def test_real_mixing_never_carries_more(seed: int, kv_heads: int, biased: bool) -> None:
    shape = Shape(kv_heads=kv_heads, group=1, biases=("k",) if biased else ())
    layer, inputs = random_layer(shape, seed=seed), _inputs(shape, seed)
    weights = _weights(layer, seed)
    _, found = _mixed(layer, inputs, weights)
    real = torch.linalg.eigvalsh(_covariance(layer, inputs, weights).real)
    slack = 1e-9 * real.sum(-1, keepdim=True)
    assert bool((found.energy.cumsum(-1) >= _sums(real) - slack).all())
    assert_close(found.energy.sum(-1), real.sum(-1), atol=float(slack.max()))
    if kv_heads > 1:  # phases of random heads differ, and then it is strictly more
        assert bool((found.energy[:, 0] > (1 + 1e-6) * real[:, -1]).all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), kv_heads=st.integers(2, 5))
def test_without_phases_real_mixing_carries_as_much(seed: int, kv_heads: int) -> None:
    """The second dim of every plane is zero: the covariance is real."""
    shape = Shape(kv_heads=kv_heads, group=1)
    layer, inputs = random_layer(shape, seed=seed), _inputs(shape, seed)
    assert layer.k is not None
    flat = layer.k.clone()
    flat[:, [j for _, j in pairs_of(layer)]] = 0
    layer, weights = dataclasses.replace(layer, k=flat), _weights(layer, seed)
    _, found = _mixed(layer, inputs, weights)
    covariance = _covariance(layer, inputs, weights)
    assert float(covariance.imag.abs().max()) == 0
    expected = torch.linalg.eigvalsh(covariance.real).flip(-1)
    assert_close(found.energy, expected, atol=1e-9 * float(expected.max()))


def test_two_heads_a_quarter_turn_apart_are_one_component() -> None:
    """Real mixing keeps half of their energy in one key."""
    shape = Shape(kv_heads=2, group=1, rope_dim=2, head_dim=2)
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    assert layer.k is not None
    first, second = layer.k[0]
    layer = dataclasses.replace(layer, k=torch.stack([layer.k[0], torch.stack([-second, first])]))
    _, found = _mixed(layer, inputs, torch.ones(2, 1, dtype=torch.float64))
    assert_close(found.energy[:, 1] / found.energy[:, 0], found.energy.new_zeros(1), atol=1e-12)
    real = torch.linalg.eigvalsh(_covariance(layer, inputs, torch.ones(2, 1)).real)
    assert_close(real[:, 0], real[:, 1], atol=1e-10)


@rotary
def test_phases_of_heads_do_not_matter(shape: Shape) -> None:
    """Turning a plane of a head and of its queries alike gives the same model."""
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    weights = _weights(layer)
    rows, found = _mixed(layer, inputs, weights)
    angle = 3 * randn(shape.kv_heads, rows.planes, seed=11)
    phase = torch.polar(torch.ones_like(angle), angle)
    turned_rows = phase[..., None] * rows.turning_k
    pairs = torch.stack([turned_rows.real, turned_rows.imag], 2).flatten(1, 2)
    other = dataclasses.replace(rows, k=torch.cat([pairs, rows.k[:, shape.rope_dim :]], 1))
    turned = mixture(other, inputs_of([inputs]).own[0], weights).of(other)
    assert_close(turned.energy, found.energy, atol=1e-10 * float(found.energy.max()))
    size = found.maps.abs()
    assert_close(turned.maps.abs(), size, atol=1e-8 * float(size.max()))


def test_heads_that_nobody_reads_are_kept_all_the_same() -> None:
    shape = SHAPES["MHA"]
    layer, inputs = random_layer(shape, seed=1), _inputs(shape)
    for weights in (torch.zeros(4, 2), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [0, 0]])):
        _, found = _mixed(layer, inputs, weights.double())
        keys = torch.einsum("gpj,tpj->tgp", found.maps, _components(found, inputs))
        expected = _turning(layer, "k", inputs)
        assert_close(torch.view_as_real(keys), torch.view_as_real(expected), atol=1e-8)


def test_a_layer_without_positions_has_no_components() -> None:
    layer = random_layer(SHAPES["NoPE"], seed=1)
    rows, found = _mixed(layer, _inputs(SHAPES["NoPE"]), _weights(layer))
    assert query_energy(rows, inputs_of([_inputs(SHAPES["NoPE"])]).own[0]).shape == (8, 0)
    assert found.rows.shape == (0, 4, 8)
    assert found.maps.shape == (4, 0, 4)
    assert found.energy.shape == (0, 4)

"""What merging loses is what it predicts, measured on samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.group import adjacent
from convert.methods.merge import Inputs, merge_heads, merge_values, moments_of
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, correlated, inputs_of, randn, random_layer
from tests.methods.merge_losses import (
    LOST,
    SAMPLES,
    SHAPES,
    lost_values,
    random_unit,
    ridge_moves,
    scattered,
    shapes,
    silent,
)


@shapes
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("no_ridge")
def test_every_member_loses_what_is_predicted(shape: Shape, count: int) -> None:
    layers = random_unit(shape, count, seed=1)
    samples = correlated(count, SAMPLES, shape.hidden, seed=5)
    for groups in (scattered(shape, count), adjacent(4, 1, count), adjacent(4, 2, count)):
        merged, losses = merge_heads(layers, groups, inputs_of(samples))
        for part, lost_by in LOST.items():
            loss = losses[part]
            total = lost_by(layers, silent(merged), groups, samples)
            lost = lost_by(layers, merged, groups, samples)
            scale = float(total.sum())
            assert_close(loss.total, total, atol=1e-9 * scale)
            assert_close(loss.lost, lost, atol=1e-9 * scale)
            assert loss.share == pytest.approx(float(lost.sum()) / scale, abs=1e-9)
            for own, of_layer in zip(loss.of_layers(count), lost.chunk(count), strict=True):
                assert_close(own.lost, of_layer, atol=1e-9 * scale)


@shapes
def test_the_ridge_moves_the_prediction_no_more_than_it_must(shape: Shape) -> None:
    layers, groups = random_unit(shape, 2, seed=1), scattered(shape, 2)
    samples = correlated(2, SAMPLES, shape.hidden, seed=5)
    merged, losses = merge_heads(layers, groups, inputs_of(samples))
    for part, lost_by in LOST.items():
        measured = lost_by(layers, merged, groups, samples).sum()
        total, lost = losses[part].total.sum(), losses[part].lost.sum()
        assert abs(float(lost - measured)) <= ridge_moves(samples) * float(total)


def test_merging_changes_no_more_than_projections() -> None:
    shape = SHAPES["interleaved"]
    layers = random_unit(shape, 2, seed=1)
    merged, _ = merge_heads(layers, adjacent(4, 2, 2))
    for before, after in zip(layers, merged, strict=True):
        assert after.geometry == dataclasses.replace(before.geometry, kv_heads=2)
        assert after.o_bias is before.o_bias
        assert after.rope == before.rope
    assert all(getattr(merged[1], name) is None for name in ("k", "v", "k_bias", "v_bias"))
    bare = [dataclasses.replace(layer, q_bias=None, k_bias=None, v_bias=None) for layer in layers]
    samples = correlated(2, SAMPLES, shape.hidden, seed=5)
    for layer in merge_heads(bare, adjacent(4, 2, 2), inputs_of(samples))[0]:
        assert layer.q_bias is layer.k_bias is layer.v_bias is None


@shapes
@pytest.mark.usefixtures("no_ridge")
def test_consumers_that_the_producers_input_determines_lose_nothing(shape: Shape) -> None:
    """The second layer sees the first one's input through a matrix, and undoes it."""
    shape = dataclasses.replace(shape, biases=())
    producer, consumer = random_unit(shape, 2, seed=3)
    assert producer.k is not None
    assert producer.v is not None
    mixture = torch.eye(shape.hidden, dtype=torch.float64) + 0.2 * randn(7, 7, seed=8)
    undone = torch.linalg.inv(mixture)
    # complex multiples in each plane for the keys, any invertible matrix for the values
    turned, mixed = _multiplied(producer, 0.7, 0.4), randn(3, 3, seed=9) @ producer.v
    consumer = dataclasses.replace(consumer, k=turned @ undone, v=mixed @ undone)
    first = randn(SAMPLES, shape.hidden, seed=4) + 1
    samples = [first, first @ mixture.T]
    groups = adjacent(4, 4, 2)
    layers = [producer, consumer]
    merged, losses = merge_heads(layers, groups, inputs_of(samples))
    for part, lost_by in LOST.items():
        total = float(losses[part].total.sum())
        assert float(lost_by(layers, merged, groups, samples).sum()) <= 1e-10 * total
        assert float(losses[part].lost.abs().sum()) <= 1e-10 * total


def _multiplied(layer: AttentionLayer, real: float, imaginary: float) -> Tensor:
    """Keys, all planes times one complex number and the rest by minus two."""
    assert layer.k is not None
    assert layer.rope is not None
    keys, dim = -2 * layer.k, layer.rope.dim
    step = 1 if layer.rope.interleaved else dim // 2
    for i in range(0, dim, 2) if layer.rope.interleaved else range(dim // 2):
        a, b = layer.k[:, i], layer.k[:, i + step]
        keys[:, i], keys[:, i + step] = real * a - imaginary * b, imaginary * a + real * b
    return keys


@shapes
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.usefixtures("no_ridge")
def test_without_moments_inputs_are_equal_and_white(shape: Shape, count: int) -> None:
    layers, groups = random_unit(shape, count, seed=6), scattered(shape, count)
    identity = torch.eye(shape.hidden + 1, dtype=torch.float64)
    white = Inputs((identity,) * count, (identity,) * count)
    found, losses = merge_heads(layers, groups)
    expected, expected_losses = merge_heads(layers, groups, white)
    for part in "kv":
        total = float(expected_losses[part].total.sum())
        assert_close(losses[part].total, expected_losses[part].total, atol=1e-9 * total)
        assert_close(losses[part].lost, expected_losses[part].lost, atol=1e-9 * total)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"):
            tensor, other = getattr(mine, name), getattr(theirs, name)
            assert (tensor is None) == (other is None)
            if tensor is not None:
                assert_close(tensor, other, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.usefixtures("no_ridge")
def test_values_alone_lose_what_is_predicted_and_leave_keys_alone(count: int) -> None:
    shape = SHAPES["interleaved"]
    layers = random_unit(shape, count, seed=1)
    samples = correlated(count, SAMPLES, shape.hidden, seed=5)
    groups = adjacent(4, 2, count)
    merged, loss = merge_values(layers, groups, inputs_of(samples))
    measured = lost_values(layers, merged, groups, samples)
    assert_close(loss.lost, measured, atol=1e-9 * float(loss.total.sum()))
    assert merged[0].k is layers[0].k
    assert all(layer.q is before.q for layer, before in zip(merged, layers, strict=True))


def test_unpredicted_values_are_what_a_regression_leaves() -> None:
    """Each member's error, as the query heads that read it put it into the residual stream."""
    shape = Shape(kv_heads=2, group=2, biases=("v",))
    layers = [random_layer(shape, seed=seed) for seed in (3, 4)]
    samples = correlated(2, 60, shape.hidden, seed=5)
    found = moments_of(layers, inputs_of(samples)).value_unpredicted
    layer, given = layers[1], augmented(samples[0])
    assert layer.v is not None
    assert layer.v_bias is not None
    assert layer.o is not None
    # a ridge of a millionth of the mean power, as rows of the regression
    ridge = (1e-6 * given.square().sum() / given.shape[1]).sqrt()
    design = torch.cat([given, ridge * torch.eye(given.shape[1], dtype=torch.float64)])
    expected = torch.zeros(4, dtype=torch.float64)
    for head in range(4):
        value = samples[1] @ layer.v[head // 2].T + layer.v_bias[head // 2]
        wanted = torch.cat([value, value.new_zeros(given.shape[1], value.shape[1])])
        found_value = given @ torch.linalg.lstsq(design, wanted).solution
        for sign, part in ((1, value), (-1, found_value)):
            energy = (part @ layer.o[:, head].T).square().sum(1).mean()
            expected[2 + head // 2] += sign * energy
    assert_close(found, expected, atol=1e-9 * float(expected.max()))
    assert float(expected[2:].min()) > 0

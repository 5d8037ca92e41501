"""Merging against the scores and outcomes of samples, against rivals, and against an optimiser.

The energy that merging loses is measured here from the layers before and after alone: on every pair
of samples, what a query makes of a key in each plane and in the dims without RoPE, and on every
sample what a head adds to the residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods import merge
from convert.methods.group import adjacent
from convert.methods.merge import Inputs, merge_heads, merge_values, moments_of
from convert.methods.pool import MERGES, Merge, pool
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, correlated, inputs_of, randn, random_layer

SAMPLES = 40
Groups = Sequence[Sequence[int]]
SHAPES = {
    "partial": Shape(),
    "interleaved": Shape(interleaved=True, biases=("q", "k", "v", "o")),
    "full": Shape(rope_dim=6, biases=("k",)),
    "none": Shape(rope_dim=0, biases=("q", "v")),
    "one reader": Shape(group=1, head_dim=4, rope_dim=4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are then the plain least squares fit, and what they lose is exact."""
    monkeypatch.setattr(merge, "_RIDGE", 0.0)


def _unit(shape: Shape, count: int, *, seed: int) -> list[AttentionLayer]:
    return [random_layer(shape, seed=seed + layer) for layer in range(count)]


def _scattered(shape: Shape, count: int) -> list[tuple[int, ...]]:
    """Two groups with equally many members of every layer, none of them neighbours."""
    even = range(0, count * shape.kv_heads, 2)
    return [tuple(even), tuple(member + 1 for member in even)]


def _heads(layer: AttentionLayer, part: str, rows: Tensor) -> Tensor:
    """[n, T, D] of inputs [T, E]."""
    heads = torch.einsum("hde,te->htd", getattr(layer, part), rows)
    bias = getattr(layer, f"{part}_bias")
    return heads if bias is None else heads + bias[:, None]


def _products(layer: AttentionLayer, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What queries [T, D] make of keys [T, D]: complex [T, T] of each plane, and the real rest."""
    assert layer.rope is not None
    dim = layer.rope.dim
    step = 1 if layer.rope.interleaved else dim // 2
    firsts = range(0, dim, 2) if layer.rope.interleaved else range(dim // 2)

    def plane(heads: Tensor, first: int) -> Tensor:
        return torch.complex(heads[:, first], heads[:, first + step])

    turning = [torch.outer(plane(query, f), plane(key, f).conj()) for f in firsts]
    empty = query.new_zeros(0, len(query), len(key))
    planes = torch.stack(turning) if turning else torch.complex(empty, empty)
    return planes, query[:, dim:] @ key[:, dim:].T


def _readers(groups: Groups, layer: int, before: AttentionLayer) -> list[tuple[int, int, int]]:
    """(member, its query head before, its query head after) of every query head of a layer."""
    heads, size = before.geometry.kv_heads, before.geometry.group
    members = [m for group in groups for m in group if m // heads == layer]
    return [
        (member, member % heads * size + reader, place * size + reader)
        for place, member in enumerate(members)
        for reader in range(size)
    ]


def _lost_keys(
    before: Sequence[AttentionLayer],
    after: Sequence[AttentionLayer],
    groups: Groups,
    samples: Sequence[Tensor],
) -> Tensor:
    """Energy [M] of the keys of each member that queries no longer find."""
    size = before[0].geometry.kv_heads
    lost = torch.zeros(len(before) * size, dtype=torch.float64)
    new_keys = _heads(after[0], "k", samples[0])
    for index, (old, new, rows) in enumerate(zip(before, after, samples, strict=True)):
        keys, queries = (_heads(old, part, rows) for part in "kq")
        new_queries = _heads(new, "q", rows)
        for member, head, place in _readers(groups, index, old):
            slot = place // (old.geometry.heads // len(groups))
            planes, rest = _products(old, queries[head], keys[member % size])
            new_planes, new_rest = _products(old, new_queries[place], new_keys[slot])
            lost[member] += (planes - new_planes).abs().square().mean((1, 2)).sum()
            lost[member] += (rest - new_rest).square().mean()
    return lost


def _lost_values(
    before: Sequence[AttentionLayer],
    after: Sequence[AttentionLayer],
    groups: Groups,
    samples: Sequence[Tensor],
) -> Tensor:
    """Energy [M] of what each member adds to the residual stream and no longer does."""
    size = before[0].geometry.kv_heads
    lost = torch.zeros(len(before) * size, dtype=torch.float64)
    new_values = _heads(after[0], "v", samples[0])
    for index, (old, new, rows) in enumerate(zip(before, after, samples, strict=True)):
        values = _heads(old, "v", rows)
        assert old.o is not None
        assert new.o is not None
        for member, head, place in _readers(groups, index, old):
            slot = place // (old.geometry.heads // len(groups))
            added = values[member % size] @ old.o[:, head].T
            lost[member] += (added - new_values[slot] @ new.o[:, place].T).square().sum(1).mean()
    return lost


LOST = {"k": _lost_keys, "v": _lost_values}


def _silent(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The layers with no queries and no output, which lose everything."""
    return [
        dataclasses.replace(layer, q=0 * layer.q, q_bias=None, o=0 * layer.o) for layer in layers
    ]


@shapes
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("no_ridge")
def test_every_member_loses_what_is_predicted(shape: Shape, count: int) -> None:
    layers = _unit(shape, count, seed=1)
    samples = correlated(count, SAMPLES, shape.hidden, seed=5)
    for groups in (_scattered(shape, count), adjacent(4, 1, count), adjacent(4, 2, count)):
        merged, losses = merge_heads(layers, groups, inputs_of(samples))
        for part, lost_by in LOST.items():
            loss = losses[part]
            total = lost_by(layers, _silent(merged), groups, samples)
            lost = lost_by(layers, merged, groups, samples)
            scale = float(total.sum())
            assert_close(loss.total, total, atol=1e-9 * scale)
            assert_close(loss.lost, lost, atol=1e-9 * scale)
            assert loss.share == pytest.approx(float(lost.sum()) / scale, abs=1e-9)
            for own, of_layer in zip(loss.of_layers(count), lost.chunk(count), strict=True):
                assert_close(own.lost, of_layer, atol=1e-9 * scale)


def _ridge_moves(samples: Sequence[Tensor]) -> float:
    """Bound on the share of the energy by which the ridge r moves predicted from measured loss.

    With rows P that predict and rows W that were merged they differ by ``2 r P W^T``; neither has
    more than all the energy, which is at least the smallest eigenvalue of the moment times P^2.
    """
    rows = augmented(samples[0])
    moment = rows.T @ rows / len(rows)
    ridge = 1e-6 * float(moment.diagonal().mean())
    return 2 * ridge / float(torch.linalg.eigvalsh(moment)[0])


@shapes
def test_the_ridge_moves_the_prediction_no_more_than_it_must(shape: Shape) -> None:
    layers, groups = _unit(shape, 2, seed=1), _scattered(shape, 2)
    samples = correlated(2, SAMPLES, shape.hidden, seed=5)
    merged, losses = merge_heads(layers, groups, inputs_of(samples))
    for part, lost_by in LOST.items():
        measured = lost_by(layers, merged, groups, samples).sum()
        total, lost = losses[part].total.sum(), losses[part].lost.sum()
        assert abs(float(lost - measured)) <= _ridge_moves(samples) * float(total)


def test_merging_changes_no_more_than_projections() -> None:
    shape = SHAPES["interleaved"]
    layers = _unit(shape, 2, seed=1)
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
    producer, consumer = _unit(shape, 2, seed=3)
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
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_published_merges_never_lose_less(shape: Shape, name: Merge, count: int, seed: int) -> None:
    layers = _unit(shape, count, seed=20 * seed)
    samples = correlated(count, SAMPLES, shape.hidden, seed=seed)
    for kv_heads in (1, 2):
        groups = adjacent(4, kv_heads, count)
        ours, _ = merge_heads(layers, groups, inputs_of(samples))
        theirs = pool(layers, kv_heads=kv_heads, merge=name)
        for lost_by in LOST.values():
            mine = float(lost_by(layers, ours, groups, samples).sum())
            other = float(lost_by(layers, theirs, groups, samples).sum())
            total = float(lost_by(layers, _silent(ours), groups, samples).sum())
            # the ridge keeps predictions that much from the best
            slack = _ridge_moves(samples) if count > 1 else 1e-9
            assert mine <= other + slack * total


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("no_ridge")
def test_phases_alone_and_real_factors_alone_lose_more(count: int, seed: int) -> None:
    """With one plane, the best key for given factors is a complex least squares fit on samples."""
    shape = Shape(head_dim=2, rope_dim=2, hidden=5, kv_heads=2, biases=("k",))
    layers = _unit(shape, count, seed=20 * seed)
    samples = correlated(count, SAMPLES, shape.hidden, seed=seed)
    groups = adjacent(2, 1, count)
    merged, _ = merge_heads(layers, groups, inputs_of(samples))
    ours = float(_lost_keys(layers, merged, groups, samples).sum())
    keys = [_heads(layer, "k", rows) for layer, rows in zip(layers, samples, strict=True)]
    members = torch.view_as_complex(torch.cat(keys).contiguous())  # [M, T]
    queries = [_heads(layer, "q", rows) for layer, rows in zip(layers, samples, strict=True)]
    power = torch.cat([q.square().sum(2).mean(1).reshape(2, 2).sum(1) for q in queries])
    design = augmented(samples[0]).to(members.dtype)
    best = torch.inf
    for trial in range(50):
        factor = randn(len(members), seed=trial)
        rivals = (torch.polar(torch.ones_like(factor), 9 * factor), factor + 0j)
        for rival in rivals:
            weighted = (power.sqrt() * rival)[:, None, None] * design
            wanted = (power.sqrt()[:, None] * members).flatten()
            fit = torch.linalg.lstsq(weighted.flatten(0, 1), wanted[:, None]).solution
            error = wanted - (weighted.flatten(0, 1) @ fit)[:, 0]
            best = min(best, float(error.abs().square().sum()) / SAMPLES)
    assert ours < best


def _optimised(lost: Callable[..., Tensor], *parameters: Tensor) -> float:
    """Least value of a function that LBFGS finds from where the parameters are."""
    parts = [parameter.requires_grad_() for parameter in parameters]
    optimiser = torch.optim.LBFGS(
        parts, max_iter=1000, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = lost(*parts)
        loss.backward()
        return loss

    for _ in range(5):
        optimiser.step(closure)
    return float(closure().detach())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("no_ridge")
def test_an_optimiser_of_all_weights_finds_nothing_better(seed: int) -> None:
    """Two heads of two layers become one: its rows, and what queries and outputs make of it."""
    shape = Shape(
        kv_heads=2, group=1, head_dim=3, rope_dim=2, value_dim=2, hidden=4, biases=("q", "k", "v")
    )
    layers = _unit(shape, 2, seed=20 * seed)
    samples = correlated(2, SAMPLES, shape.hidden, seed=seed)
    groups = adjacent(2, 1, 2)
    merged, _ = merge_heads(layers, groups, inputs_of(samples))
    (producer, consumer) = (
        dataclasses.replace(layer, geometry=dataclasses.replace(layer.geometry, kv_heads=1))
        for layer in layers
    )

    def rebuilt(
        factor: Tensor, rest: Tensor, out: Tensor, key: Tensor, value: Tensor
    ) -> list[AttentionLayer]:
        """Queries times factor [M, 2] and rest [M], outputs times out [M, 2, 2], and new rows."""
        after = []
        for index, layer in enumerate((producer, consumer)):
            own = slice(2 * index, 2 * index + 2)
            assert layer.q is not None
            assert layer.q_bias is not None
            assert layer.o is not None
            real, imaginary = factor[own, :1], factor[own, 1:]
            weight = torch.cat([layer.q, layer.q_bias[..., None]], -1)
            a, b, c = weight.unbind(1)
            turned = [real * a + imaginary * b, real * b - imaginary * a, rest[own, None] * c]
            query = torch.stack(turned, 1)
            output = torch.einsum("ehd,hdf->ehf", layer.o, out[own])
            after.append(
                dataclasses.replace(
                    layer,
                    q=query[..., :-1],
                    q_bias=query[..., -1],
                    o=output,
                    k=key[None, :, :-1],
                    k_bias=key[None, :, -1],
                    v=value[None, :, :-1],
                    v_bias=value[None, :, -1],
                )
            )
        return after

    start = (
        randn(4, 2, seed=seed + 1),
        randn(4, seed=seed + 2),
        randn(4, 2, 2, seed=seed + 3),
        randn(3, 5, seed=seed + 4),
        randn(2, 5, seed=seed + 5),
    )
    for lost_by in LOST.values():

        def lost(*parts: Tensor, by: Callable[..., Tensor] = lost_by) -> Tensor:
            return by(layers, rebuilt(*parts), groups, samples).sum()

        starts = ([(1 + trial) * part.clone() for part in start] for trial in range(2))
        best = min(_optimised(lost, *parts) for parts in starts)
        ours = float(lost_by(layers, merged, groups, samples).sum())
        assert ours == pytest.approx(best, rel=1e-6)


@shapes
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.usefixtures("no_ridge")
def test_without_moments_inputs_are_equal_and_white(shape: Shape, count: int) -> None:
    layers, groups = _unit(shape, count, seed=6), _scattered(shape, count)
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
    layers = _unit(shape, count, seed=1)
    samples = correlated(count, SAMPLES, shape.hidden, seed=5)
    groups = adjacent(4, 2, count)
    merged, loss = merge_values(layers, groups, inputs_of(samples))
    measured = _lost_values(layers, merged, groups, samples)
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

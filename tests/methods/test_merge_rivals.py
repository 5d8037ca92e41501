"""Merging against published merges, poorer factors, and an optimiser of all weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods.group import adjacent
from convert.methods.merge import merge_heads
from convert.methods.pool import MERGES, Merge, pool
from tests.methods.layers import Shape, augmented, correlated, inputs_of, randn
from tests.methods.merge_losses import (
    LOST,
    SAMPLES,
    lost_keys,
    projected,
    random_unit,
    ridge_moves,
    shapes,
    silent,
)


@shapes
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_published_merges_never_lose_less(shape: Shape, name: Merge, count: int, seed: int) -> None:
    layers = random_unit(shape, count, seed=20 * seed)
    samples = correlated(count, SAMPLES, shape.hidden, seed=seed)
    for kv_heads in (1, 2):
        groups = adjacent(4, kv_heads, count)
        ours, _ = merge_heads(layers, groups, inputs_of(samples))
        theirs = pool(layers, kv_heads=kv_heads, merge=name)
        for lost_by in LOST.values():
            mine = float(lost_by(layers, ours, groups, samples).sum())
            other = float(lost_by(layers, theirs, groups, samples).sum())
            total = float(lost_by(layers, silent(ours), groups, samples).sum())
            # the ridge keeps predictions that much from the best
            slack = ridge_moves(samples) if count > 1 else 1e-9
            assert mine <= other + slack * total


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("no_ridge")
def test_phases_alone_and_real_factors_alone_lose_more(count: int, seed: int) -> None:
    """With one plane, the best key for given factors is a complex least squares fit on samples."""
    shape = Shape(head_dim=2, rope_dim=2, hidden=5, kv_heads=2, biases=("k",))
    layers = random_unit(shape, count, seed=20 * seed)
    samples = correlated(count, SAMPLES, shape.hidden, seed=seed)
    groups = adjacent(2, 1, count)
    merged, _ = merge_heads(layers, groups, inputs_of(samples))
    ours = float(lost_keys(layers, merged, groups, samples).sum())
    keys = [projected(layer, "k", rows) for layer, rows in zip(layers, samples, strict=True)]
    members = torch.view_as_complex(torch.cat(keys).contiguous())  # [M, T]
    queries = [projected(layer, "q", rows) for layer, rows in zip(layers, samples, strict=True)]
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
    layers = random_unit(shape, 2, seed=20 * seed)
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

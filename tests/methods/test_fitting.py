"""Fits of whole units: what stays, what never gets worse, and what is measured of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from convert.layer import AttentionLayer
from convert.methods import fitting
from convert.methods.attention import Scoring, keys, plane_order, queries, values, with_head_order
from convert.methods.fitting import (
    Observed,
    Shared,
    head_outputs,
    projected,
    refit_outcome,
    row_divergence,
    second_moments,
)
from convert.methods.merge import merge_heads
from convert.methods.refit_outcome import ValueReader, refit_output, refit_values
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, causal, randn, random_layer

N, T, E = 3, 8, 5
SHAPE = Shape(hidden=E, biases=("q", "v", "o"))
GROUPS, ORDER = [(0, 2), (1, 3)], (0, 1, 4, 5, 2, 3, 6, 7)


def _ready(layer: AttentionLayer) -> AttentionLayer:
    return with_head_order(layer, plane_order(layer))


def _outcome(layer: AttentionLayer, scoring: Scoring, inputs: Tensor, shared: Shared) -> Tensor:
    return projected(layer, head_outputs(queries(layer, scoring, inputs), scoring, shared))


def _observed(layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Observed:
    ready = _ready(layer)
    shared = (keys(ready, scoring, inputs), values(ready, scoring, inputs))
    outputs = _outcome(ready, scoring, inputs, shared)
    return Observed(
        layer=ready,
        scoring=scoring,
        query_order=ORDER,
        before=inputs,
        inputs=inputs,
        outputs=outputs,
    )


def _unit(count: int, shape: Shape = SHAPE) -> tuple[list[Observed], list[AttentionLayer]]:
    """Original layers that were observed, and their merge to two heads."""
    layers = [random_layer(shape, seed=3 + layer) for layer in range(count)]
    groups = [
        tuple(4 * layer + member for layer in range(count) for member in group) for group in GROUPS
    ]
    scoring = causal(T, 2, window=5)
    seen = [_observed(layer, scoring, randn(N, T, E, seed=9 + i)) for i, layer in enumerate(layers)]
    return seen, [_ready(layer) for layer in merge_heads(layers, groups)[0]]


def _log_weights(layer: AttentionLayer, scoring: Scoring, inputs: Tensor, key: Tensor) -> Tensor:
    """[N, H, T, T] in whatever order the layer has its heads."""
    query = linear(inputs, layer.q.flatten(0, 1), layer.q_bias.flatten())
    query = query.unflatten(-1, layer.q.shape[:2]).transpose(1, 2)
    turning = torch.view_as_complex(query[..., :4].unflatten(-1, (2, 2)).contiguous())
    turned = torch.view_as_real(turning * scoring.turn).flatten(-2)
    query = torch.cat([turned, query[..., 4:]], -1)
    read = key.repeat_interleave(8 // key.shape[1], 1)
    scores = scoring.scale * query @ read.mT
    return scores.masked_fill(~scoring.visible, -1e9).log_softmax(-1)


@pytest.mark.parametrize("biases", [("q", "v", "o"), ("k",)], ids=["biases", "no biases"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_outcome_of_all_layers_never_gets_further_away(
    count: int, biases: Sequence[str]
) -> None:
    """Values and output of the producer are fitted for every layer that reads them."""
    seen, merged = _unit(count, dataclasses.replace(SHAPE, biases=biases))
    scoring, inputs = seen[0].scoring, seen[0].inputs

    def errors(unit: Sequence[AttentionLayer]) -> list[float]:
        shared = (keys(unit[0], scoring, inputs), values(unit[0], scoring, inputs))
        found = [
            _outcome(layer, scoring, item.inputs, shared)
            for layer, item in zip(unit, seen, strict=True)
        ]
        return [
            float((f - item.outputs).square().sum()) for f, item in zip(found, seen, strict=True)
        ]

    shared = (keys(merged[0], scoring, inputs), values(merged[0], scoring, inputs))
    asked = queries(merged[0], scoring, inputs)
    options = {"asked": asked, "inputs": inputs, "shared": shared, "target": seen[0].outputs}
    fitted = refit_outcome(0, seen, merged, **options)
    before, after = errors(merged), errors(fitted)
    assert sum(after) < sum(before)
    for layer in range(1, count):  # consumers have an output of their own, and nothing else
        given = values(fitted[0], scoring, inputs)
        options = {
            "asked": queries(fitted[layer], scoring, seen[layer].inputs),
            "inputs": seen[layer].inputs,
            "shared": (shared[0], given),
            "target": seen[layer].outputs,
        }
        fitted = refit_outcome(layer, seen, fitted, **options)
        assert errors(fitted)[layer] < after[layer]
        assert errors(fitted)[:layer] == errors(fitted[:layer] + merged[layer:])[:layer]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_outcomes_that_are_right_already_stay(count: int) -> None:
    """Every layer gives what is wanted of it, with the producer's values and inputs of its own."""
    seen, merged = _unit(count)
    scoring, inputs = seen[0].scoring, seen[0].inputs
    shared = (keys(merged[0], scoring, inputs), values(merged[0], scoring, inputs))
    content = [
        dataclasses.replace(item, outputs=_outcome(layer, scoring, item.inputs, shared))
        for item, layer in zip(seen, merged, strict=True)
    ]
    asked, target = queries(merged[0], scoring, inputs), content[0].outputs
    fitted = refit_outcome(
        0, content, merged, asked=asked, inputs=inputs, shared=shared, target=target
    )
    for after, before in zip(fitted, merged, strict=True):
        for name in ("v", "v_bias", "o", "o_bias"):
            if getattr(before, name) is not None:
                assert_close(getattr(after, name), getattr(before, name), atol=1e-8)
        for name in ("q", "k"):
            assert getattr(after, name) is getattr(before, name)


def test_values_are_fitted_for_what_each_layer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer has attention weights of its own, from its inputs and the producer's keys."""
    seen, merged = _unit(2)
    scoring, inputs = seen[0].scoring, seen[0].inputs
    shared = (keys(merged[0], scoring, inputs), values(merged[0], scoring, inputs))
    given: list[Sequence[ValueReader]] = []

    def recorded(readers: Sequence[ValueReader], *arguments: Any, **options: Any) -> Tensor:
        given.append([dataclasses.replace(r, missing=r.missing.clone()) for r in readers])
        return refit_values(readers, *arguments, **options)

    monkeypatch.setattr(fitting, "refit_values", recorded)
    asked, target = queries(merged[0], scoring, inputs), seen[0].outputs
    fitted = refit_outcome(
        0, seen, merged, asked=asked, inputs=inputs, shared=shared, target=target
    )
    after = values(fitted[0], scoring, inputs)
    assert len(given) == 2  # KV heads
    for place, readers in enumerate(given):
        assert len(readers) == 2
        for reader, layer, item in zip(readers, merged, seen, strict=True):
            whole = _log_weights(layer, scoring, item.inputs, shared[0]).exp()
            assert_close(reader.weights, whole[:, 4 * place :][:, :4], atol=1e-12)
            # the output was fitted to all values, of which those before are fitted by now
            now = torch.cat([after[:, :place], shared[1][:, place:]], 1)
            before = _with_output(layer, _heads(whole, shared[1]), item.outputs)
            missing = item.outputs - projected(before, _heads(whole, now))
            scale = item.outputs.square().mean().rsqrt()
            assert_close(reader.missing, scale * missing, atol=1e-10)
            assert before.o is not None
            assert_close(reader.output, scale * before.o[:, 4 * place :][:, :4], atol=1e-10)


def test_the_last_output_is_fitted_to_the_new_values() -> None:
    seen, merged = _unit(2)
    scoring, inputs = seen[0].scoring, seen[0].inputs
    shared = (keys(merged[0], scoring, inputs), values(merged[0], scoring, inputs))
    asked, target = queries(merged[0], scoring, inputs), seen[0].outputs
    fitted = refit_outcome(
        0, seen, merged, asked=asked, inputs=inputs, shared=shared, target=target
    )
    after = values(fitted[0], scoring, inputs)
    for layer, item, found in zip(merged, seen, fitted, strict=True):
        whole = _log_weights(layer, scoring, item.inputs, shared[0]).exp()
        first = _with_output(layer, _heads(whole, shared[1]), item.outputs)
        last = _with_output(first, _heads(whole, after), item.outputs)
        for name in ("o", "o_bias"):
            assert_close(getattr(found, name), getattr(last, name), atol=1e-10)


def _heads(mixing: Tensor, value: Tensor) -> Tensor:
    """[N, T, H, Dv] of weights [N, H, T, T] and values [N, Hkv, T, Dv]."""
    each = value.repeat_interleave(mixing.shape[1] // value.shape[1], 1)
    return torch.einsum("nhts,nhsd->nthd", mixing, each)


def _with_output(layer: AttentionLayer, heads: Tensor, target: Tensor) -> AttentionLayer:
    assert layer.o is not None
    output, bias = refit_output(heads, target, layer.o, layer.o_bias)
    return dataclasses.replace(layer, o=output, o_bias=bias)


def test_moments_are_means_of_products() -> None:
    inputs = [randn(N, T, E, seed=seed).float() for seed in range(3)]
    rows = [augmented(part.double()).flatten(0, 1) for part in inputs]
    found = second_moments(inputs)
    for place, row in enumerate(rows):
        own = sum(torch.outer(x, x) for x in row) / (N * T)
        cross = sum(torch.outer(x, y) for x, y in zip(row, rows[0], strict=True)) / (N * T)
        assert_close(found.own[place], own, atol=1e-13)
        assert_close(found.cross[place], cross, atol=1e-13)


def test_divergence_is_that_of_torch() -> None:
    """Mean over every fourth window, heads and queries, of converted rows from original ones."""
    (seen,), (merged,) = _unit(1)
    seen = dataclasses.replace(seen, inputs=randn(6, T, E, seed=3))
    inputs = seen.inputs + 0.1 * randn(6, T, E, seed=4)
    shared = (keys(merged, seen.scoring, inputs), values(merged, seen.scoring, inputs))
    found = row_divergence(seen, queries(merged, seen.scoring, inputs), seen.scoring, shared)

    key = keys(seen.layer, seen.scoring, seen.inputs)
    truth = _log_weights(seen.layer, seen.scoring, seen.inputs, key)[:, list(ORDER)]
    given = _log_weights(merged, seen.scoring, inputs, shared[0])
    each = kl_div(given, truth, log_target=True, reduction="none").sum(-1).mean((1, 2))
    assert found == pytest.approx(float(each[0] + each[4]) / 2, rel=1e-9)

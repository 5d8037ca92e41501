"""Attention of the canonical form against torch's own, and against formulas written out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from convert.layer import AttentionLayer, NormFormula, NormLayout, QkNorm
from convert.methods.attention import (
    Scoring,
    attend,
    keys,
    logits,
    plane_order,
    queries,
    rotate,
    values,
    weights,
    with_head_order,
)
from tests.helpers import assert_close, assert_equal
from tests.methods.layers import Shape, causal, randn, random_layer

N, T = 2, 7
SHAPES = {
    "full": Shape(rope_dim=6, biases=("q", "k", "v")),
    "partial": Shape(),
    "interleaved": Shape(rope_dim=6, interleaved=True),
    "partial interleaved": Shape(interleaved=True, biases=("q", "k", "v")),
    "none": Shape(rope_dim=0, group=1),
    "one KV head": Shape(kv_heads=1, group=4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def _ordered(shape: Shape, *, seed: int = 1) -> tuple[AttentionLayer, AttentionLayer]:
    """A layer as it was made, and with its planes in order."""
    layer = random_layer(shape, seed=seed)
    return layer, with_head_order(layer, plane_order(layer))


def _rotation(layer: AttentionLayer, scoring: Scoring) -> Tensor:
    """Rotation matrices [T, D, D] of heads in their own order, entry by entry."""
    assert layer.rope is not None
    dim, width = layer.rope.dim, layer.geometry.head_dim
    matrices = torch.eye(width, dtype=torch.float64).repeat(len(scoring.turn), 1, 1)
    for token, row in enumerate(scoring.turn.tolist()):
        for plane, number in enumerate(row):
            i = 2 * plane if layer.rope.interleaved else plane
            j = i + 1 if layer.rope.interleaved else i + dim // 2
            matrices[token, i, i] = matrices[token, j, j] = number.real
            matrices[token, i, j] = -number.imag
            matrices[token, j, i] = number.imag
    return matrices


def _projected(layer: AttentionLayer, part: str, inputs: Tensor) -> Tensor:
    """[N, n, T, D] in the order of the layer."""
    heads = torch.einsum("nte,hde->nhtd", inputs, getattr(layer, part))
    bias = getattr(layer, f"{part}_bias")
    return heads if bias is None else heads + bias[:, None]


def _turned(layer: AttentionLayer, scoring: Scoring, part: str, inputs: Tensor) -> Tensor:
    matrices = _rotation(layer, scoring)
    return torch.einsum("tdf,nhtf->nhtd", matrices, _projected(layer, part, inputs))


@shapes
@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_that_of_torch(shape: Shape, window: int | None) -> None:
    layer, ordered = _ordered(shape)
    scoring = causal(T, shape.rope_dim // 2, window=window)
    inputs = randn(N, T, shape.hidden, seed=2)
    found = attend(*(part(ordered, scoring, inputs) for part in (queries, keys, values)), scoring)
    place = torch.arange(T)
    behind = place[:, None] - place
    expected = scaled_dot_product_attention(
        *(_turned(layer, scoring, part, inputs) for part in "qk"),
        _projected(layer, "v", inputs),
        attn_mask=(behind >= 0) & (behind < (window or T)),
        scale=scoring.scale,
        enable_gqa=True,
    )
    assert_close(found, expected.transpose(1, 2), atol=1e-12)


@shapes
def test_rotation_is_the_rotation_matrix(shape: Shape) -> None:
    layer, _ = _ordered(shape)
    scoring = causal(T, shape.rope_dim // 2)
    order = plane_order(layer)
    heads = randn(3, T, shape.head_dim, seed=4)
    expected = torch.einsum("tdf,htf->htd", _rotation(layer, scoring), heads)[..., order]
    assert_close(rotate(heads[..., order], scoring.turn), expected, atol=1e-13)
    there = rotate(heads, scoring.turn)
    assert_close(rotate(there, scoring.turn.conj()), heads, atol=1e-13)


@shapes
def test_order_of_the_dims_changes_no_score(shape: Shape) -> None:
    layer = random_layer(dataclasses.replace(shape, biases=("q", "k")), seed=3)
    width = shape.head_dim
    normed = dataclasses.replace(
        layer,
        q_norm=torch.arange(width) + 0.5,
        k_norm=randn(shape.kv_heads, width, seed=1),
        q_norm_bias=torch.arange(width) + 0.25,
        k_norm_bias=randn(shape.kv_heads, width, seed=2),
    )
    order = plane_order(layer)
    there = with_head_order(normed, order)
    for name in ("q_bias", "k_bias", "q_norm", "k_norm", "q_norm_bias", "k_norm_bias"):
        assert_equal(getattr(there, name), getattr(normed, name)[..., order])
    for name in ("q", "k"):
        assert_equal(getattr(there, name), getattr(normed, name)[:, order])
    assert there.v is normed.v
    assert there.o is normed.o
    back = with_head_order(there, order.argsort())
    for name in ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm", "q_norm_bias", "k_norm_bias"):
        assert_equal(getattr(back, name), getattr(normed, name))


def test_planes_lie_side_by_side() -> None:
    half, pairs = Shape(head_dim=6, rope_dim=4), Shape(head_dim=6, rope_dim=4, interleaved=True)
    assert plane_order(random_layer(half, seed=0)).tolist() == [0, 2, 1, 3, 4, 5]
    assert plane_order(random_layer(pairs, seed=0)).tolist() == [0, 1, 2, 3, 4, 5]


def test_weights_are_those_of_the_formula() -> None:
    """Cap, then offset, then mask, then softmax, entry by entry."""
    scores = 3 * randn(1, 2, T, T, seed=1)
    offset = randn(2, T, T, seed=2)
    scoring = causal(T, 0, window=4, softcap=0.9, offset=offset)
    found = weights(scores, scoring)
    for head in range(2):
        for query in range(T):
            seen = range(max(0, query - 3), query + 1)
            raised = [
                math.exp(
                    0.9 * math.tanh(float(scores[0, head, query, key]) / 0.9)
                    + float(offset[head, query, key])
                )
                for key in seen
            ]
            expected = torch.zeros(T, dtype=torch.float64)
            expected[list(seen)] = torch.tensor(raised, dtype=torch.float64) / sum(raised)
            assert_close(found[0, head, query], expected, atol=1e-13)


def test_scores_are_scaled_products_of_queries_and_their_key() -> None:
    query, key, scoring = randn(N, 6, T, 4, seed=1), randn(N, 2, T, 4, seed=2), causal(T, 2)
    found = logits(query, key, scoring)
    for head in range(6):
        expected = 0.37 * query[:, head] @ key[:, head // 3].mT
        assert_close(found[:, head], expected, atol=1e-13)


def test_clamp_cuts_queries_keys_and_values() -> None:
    layer, ordered = _ordered(SHAPES["full"])
    scoring = causal(T, 3, clip=0.7)
    inputs = randn(N, T, 7, seed=2)
    matrices = _rotation(layer, scoring)
    order = plane_order(layer)
    for part, project in (("q", queries), ("k", keys)):
        clipped = _projected(layer, part, inputs).clamp(-0.7, 0.7)
        assert float(clipped.abs().max()) == 0.7  # else nothing is tested
        expected = torch.einsum("tdf,nhtf->nhtd", matrices, clipped)[..., order]
        assert_close(project(ordered, scoring, inputs), expected, atol=1e-13)
    expected = _projected(layer, "v", inputs).clamp(-0.7, 0.7)
    assert_close(values(ordered, scoring, inputs), expected, atol=1e-13)


@pytest.mark.parametrize("layout", ["shared", "per_head", "full"])
@pytest.mark.parametrize("formula", ["rms", "rms_plus_one", "layer"])
def test_norms_are_those_of_torch(layout: NormLayout, formula: NormFormula) -> None:
    layer = random_layer(Shape(kv_heads=2, group=1), seed=4)
    shape = (6,) if layout == "shared" else (2, 6)
    weight = randn(*shape, seed=5)
    bias = randn(*shape, seed=6) if formula == "layer" else None
    normed = dataclasses.replace(layer, k_norm=weight, k_norm_bias=bias)
    scoring = causal(T, 2, norm=QkNorm(layout, formula), norm_eps=0.1)
    inputs = randn(N, T, 7, seed=7)
    found = keys(with_head_order(normed, plane_order(layer)), scoring, inputs)
    heads = _projected(layer, "k", inputs).transpose(1, 2)  # [N, T, n, D]
    size = (2, 6) if layout == "full" else (6,)
    if formula == "layer":
        heads = layer_norm(heads, size, eps=0.1)
    else:
        heads = rms_norm(heads, size, eps=0.1)
    heads = heads * (weight + (formula == "rms_plus_one")) + (0 if bias is None else bias)
    expected = torch.einsum("tdf,nhtf->nhtd", _rotation(layer, scoring), heads.transpose(1, 2))
    assert_close(found, expected[..., plane_order(layer)], atol=1e-12)

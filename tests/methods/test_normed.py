"""Latents of layers with norms of queries and keys, against the formulas written out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attention import queries
from convert.methods.fitting import head_outputs, projected
from convert.methods.latent import still_keys, value_gram
from convert.methods.mixing import Mixed, Rows, mixture, rows_of
from convert.methods.normed import factored_whole, mean_factors, normed_form
from convert.methods.refit_latent import (
    expanded,
    latent_basis,
    shared_by,
    with_expanded_values,
)
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, causal, inputs_of, randn, random_layer
from tests.methods.references import (
    EPS,
    NORMS,
    frequencies,
    heads_of,
    key_factors_of,
    latent_outcome,
    latent_scores,
    original_outcome,
    original_scores,
    positive,
    with_norms,
)

T = 6
SHAPES = {
    "MHA": Shape(kv_heads=3, group=1, hidden=9),
    "GQA": Shape(kv_heads=2, group=2, biases=("q", "k", "v", "o"), interleaved=True),
    "MQA": Shape(kv_heads=1, group=3, rope_dim=6, biases=("k", "v")),
    "NoPE": Shape(kv_heads=2, group=2, rope_dim=0, biases=("q",)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@dataclass(frozen=True, slots=True)
class Case:
    layer: AttentionLayer
    inputs: Tensor
    moment: Tensor
    rows: Rows
    mixed: Mixed


def _case(shape: Shape, norm: QkNorm) -> Case:
    layer = with_norms(random_layer(shape, seed=3), norm, seed=6)
    inputs = randn(T, shape.hidden, seed=4) + 0.3
    moment = inputs_of([randn(40, shape.hidden, seed=5) + 0.2]).own[0]
    rows = rows_of(layer, norm)
    weights = 1 + randn(shape.kv_heads, rows.planes, seed=7).abs()
    return Case(layer, inputs, moment, rows, mixture(rows, moment, weights).of(rows))


def _converted(case: Case, rank: int, kept: Tensor) -> LatentLayer:
    layer, sizes = case.layer, case.layer.geometry
    turn = torch.ones(sizes.heads, *kept.shape, dtype=torch.complex128)
    found = factored_whole(
        still_keys(case.rows, case.mixed, turn, kept, 1.0),
        case.rows.v,
        key_metric=torch.stack([positive(sizes.head_dim, h) for h in range(sizes.heads)]),
        value_gram=value_gram(layer, torch.eye(sizes.heads, dtype=torch.float64)),
        moment=case.moment,
        rank=rank,
    )
    return normed_form(layer, case.rows, case.mixed, kept=kept, factored=found, scale=0.37)


@shapes
@norms
def test_nothing_is_lost_where_nothing_is_left_out(shape: Shape, norm: QkNorm) -> None:
    case = _case(shape, norm)
    found = _converted(case, shape.hidden + 1, torch.ones_like(case.mixed.energy).bool())
    given = case.inputs, frequencies(shape.rope_dim // 2)
    expected = original_scores(case.layer, *given, 0.37, norm)
    assert_close(latent_scores(found, *given, norm), expected, atol=1e-10)
    outcome = original_outcome(case.layer, *given, 0.37, norm)
    assert_close(latent_outcome(found, *given, norm), outcome, atol=1e-10)


@shapes
@norms
def test_without_rotation_nothing_has_to_turn(shape: Shape, norm: QkNorm) -> None:
    """Then all components of the keys may be in the latent."""
    case = _case(shape, norm)
    found = _converted(case, shape.hidden + 1, torch.zeros_like(case.mixed.energy).bool())
    given = case.inputs, torch.zeros(shape.rope_dim // 2)
    assert found.geometry.rope_dim == 0
    expected = original_scores(case.layer, *given, 0.37, norm)
    assert_close(latent_scores(found, *given, norm), expected, atol=1e-10)


@shapes
@norms
def test_the_expanded_form_computes_the_same(shape: Shape, norm: QkNorm) -> None:
    case = _case(shape, norm)
    kept = torch.zeros_like(case.mixed.energy).bool()
    kept[:, :1] = True
    layer = _converted(case, 4, kept)
    scoring = causal(T, shape.rope_dim // 2, norm=norm, norm_eps=EPS)
    scoring = dataclasses.replace(scoring, turn=scoring.turn[:, list(layer.planes)])
    ready, inputs = expanded(layer), case.inputs[None]
    expected = latent_outcome(layer, case.inputs, frequencies(shape.rope_dim // 2), norm)
    shared = shared_by(layer, scoring, inputs)
    found = projected(ready, head_outputs(queries(ready, scoring, inputs), scoring, shared))[0]
    assert_close(found, expected, atol=1e-10)
    back = with_expanded_values(layer, ready, latent_basis(layer, inputs))
    assert_close(back.v_up, layer.v_up, atol=1e-8)
    basis = latent_basis(layer, inputs).white[0]
    assert_close(basis, case.inputs @ layer.latent.T + layer.latent_bias, atol=1e-10)


@shapes
@norms
def test_mean_factors_of_one_token_are_its_own(shape: Shape, norm: QkNorm) -> None:
    layer = with_norms(random_layer(shape, seed=3), norm, seed=6)
    token = randn(1, shape.hidden, seed=4)
    moment = augmented(token).T @ augmented(token)
    keys = dataclasses.replace(layer, k=layer.q, k_bias=layer.q_bias)
    scale = 1e6  # beside which epsilon is nothing
    assert layer.k is not None
    assert layer.q is not None
    large = [
        dataclasses.replace(
            item, k=scale * item.k, k_bias=None if item.k_bias is None else scale * item.k_bias
        )
        for item in (layer, keys)
    ]
    k, q = (scale * key_factors_of(item, norm, token)[0] for item in large)
    expected = (q * k.repeat_interleave(shape.group)).square()
    assert_close(mean_factors(layer, norm, moment), expected, atol=1e-9 * float(expected.max()))


@shapes
def test_what_the_latent_loses_is_what_it_says(shape: Shape) -> None:
    norm = NORMS["shared"]
    case, rank = _case(shape, norm), 3
    sizes = case.layer.geometry
    inputs = randn(50, shape.hidden, seed=9) + 0.5
    moment = inputs_of([inputs]).own[0]
    keys = case.rows.k.repeat_interleave(shape.group, 0)
    metric = torch.stack([positive(sizes.head_dim, h) for h in range(sizes.heads)])
    gram = value_gram(case.layer, torch.eye(sizes.heads, dtype=torch.float64))
    found = factored_whole(
        keys, case.rows.v, key_metric=metric, value_gram=gram, moment=moment, rank=rank
    )
    latents = augmented(inputs) @ found.latent.T
    missing = torch.einsum("hde,te->htd", keys, augmented(inputs)) - torch.einsum(
        "hdr,tr->htd", found.k_up, latents
    )
    values = heads_of(case.layer, "v", inputs) - torch.einsum("hdr,tr->thd", found.v_up, latents)
    lost = torch.einsum("htd,hdf,htf->", missing, metric, missing) / len(inputs)
    lost += (values.flatten(1) @ gram * values.flatten(1)).sum() / len(inputs)
    assert abs(float(lost) - found.lost) < 1e-9 * found.energy
    # what is left of the values on average is given back by the output
    assert_close(values.mean(0), found.v_constant, atol=1e-10)

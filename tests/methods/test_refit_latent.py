"""Refits of a latent layer against dense least squares on scores from the formula of the layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods import refit_latent as module
from convert.methods import refit_scores as scores_module
from convert.methods.attention import keys, queries, values
from convert.methods.fitting import refit_outcome
from convert.methods.latent import with_idle_pairs
from convert.methods.refit_latent import (
    Reading,
    expanded,
    latent_basis,
    refit_latent_scores,
    with_expanded_values,
)
from tests.helpers import assert_close
from tests.methods.dense_latents import RIDGE, unknowns, with_rotary_key
from tests.methods.latent_cases import (
    SHAPES,
    Case,
    E,
    all_shapes,
    divergence,
    latent_case,
    normed_shapes,
    shapes,
)
from tests.methods.layers import Shape, one_by_one
from tests.methods.references import (
    frequencies,
    latent_outcome,
    latent_scores,
    original_outcome,
    original_scores,
)


@all_shapes
def test_each_fit_is_the_minimum_of_its_own_quadratic(
    shape: Shape, norm: QkNorm | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of queries; the rotary key; the map from the latent to keys; queries of each head."""
    for name, value in (("STEPS", 240), ("RIDGE", RIDGE)):
        monkeypatch.setattr(scores_module, name, value)
        monkeypatch.setattr(module, name, value)
    case = latent_case(shape, norm)
    found = case.refitted()
    each = [unknowns(case, head) for head in range(case.original.geometry.heads)]
    for dense in each:
        dense.case, start = case, dense.query
        dense.fit_map()
        assert float((dense.query - start).abs().max()) > 0.01  # else nothing is tested
        case = dataclasses.replace(case, layer=dense.layer(dense.query, dense.up))
    if shape.rope_dim != 0:
        start = case.layer.k_rope
        case = dataclasses.replace(case, layer=with_rotary_key(case))
        assert float((case.layer.k_rope - start).abs().max()) > 0.01
    for dense in each:
        dense.case, start = case, dense.up
        dense.fit_up()
        assert float((dense.up - start).abs().max()) > 0.01
        dense.fit_query()
        case = dataclasses.replace(case, layer=dense.layer(dense.query, dense.up))
    for name in ("q", "k_up", "q_bias", "q_rope", "k_rope", "k_rope_bias"):
        wanted = getattr(case.layer, name)
        if wanted is not None and wanted.numel():
            atol = 1e-7 * float(wanted.abs().max())
            assert_close(getattr(found, name), wanted, atol=atol)


@all_shapes
def test_attention_comes_nearer_to_the_original(shape: Shape, norm: QkNorm | None) -> None:
    case = latent_case(shape, norm)
    found = case.refitted()
    before, after = divergence(case, case.layer), divergence(case, found)
    assert 0 < after < 0.9 * before
    standing = ["geometry", "latent", "latent_bias", "v_up", "o", "o_bias", "planes", "k"]
    for name in standing if norm is None else [*standing, "q", "q_bias", "k_bias", "q_norm"]:
        assert getattr(found, name) is getattr(case.layer, name)


@normed_shapes
def test_normed_scores_that_are_right_already_stay(shape: Shape, norm: QkNorm) -> None:
    """With all components rotary, whatever the latent is."""
    case = latent_case(shape, norm, rank=E + 1, pairs=shape.kv_heads * shape.rope_dim // 2)
    case = dataclasses.replace(case, inputs=case.observed.inputs)
    target = case.targets()
    atol = 1e-9 * float(target.abs().max())
    assert_close(case.scores(case.layer), target, atol=atol)
    found = case.refitted()
    assert_close(case.scores(found), target, atol=atol)
    for name in ("q_rope", "k_rope", "k_rope_bias"):
        wanted = getattr(case.layer, name)
        assert not wanted.numel() or (getattr(found, name) - wanted).abs().max() < 1e-7


@shapes
def test_scores_that_are_right_already_stay(shape: Shape) -> None:
    """Dims without and with positions end up where they were, and so do the biases."""
    case = latent_case(shape)
    case = dataclasses.replace(case, inputs=case.observed.inputs)
    target = case.scores(case.layer)
    whole = expanded(case.layer)
    content = dataclasses.replace(
        case.observed, layer=whole, scoring=case.scoring, inputs=case.inputs
    )
    assert_close(content.scores(range(whole.geometry.heads)), target, atol=1e-10)
    reading = Reading(layer=case.layer, observed=content, scoring=case.scoring, inputs=case.inputs)
    (found,) = refit_latent_scores([reading], case.inputs, each=one_by_one, seed=1)
    for name in ("q", "k_up", "q_bias", "k_rope", "k_rope_bias"):
        wanted = getattr(case.layer, name)
        if wanted is not None and wanted.numel():
            assert_close(getattr(found, name), wanted, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("shape", "idle"),
    [*((shape, False) for shape in SHAPES.values()), (SHAPES["NoPE"], True)],
    ids=[*SHAPES, "NoPE idle pairs"],
)
def test_the_expanded_form_is_the_same_function(shape: Shape, idle: bool) -> None:
    case = latent_case(shape)
    layer, speeds = case.layer, frequencies(4)
    if idle:
        layer = with_idle_pairs(layer, (3, 1))
    found = expanded(layer)
    sizes = layer.geometry
    assert found.geometry.head_dim == sizes.nope_dim + sizes.rope_dim
    assert found.geometry.kv_heads == found.geometry.heads == sizes.heads
    turning = speeds[list(layer.planes)]
    for inputs in case.inputs:
        scores = original_scores(found, inputs, turning, layer.scale)
        assert_close(scores, latent_scores(layer, inputs, speeds), atol=1e-10)
        outcome = original_outcome(found, inputs, turning, layer.scale)
        assert_close(outcome, latent_outcome(layer, inputs, speeds), atol=1e-10)


def test_latents_are_what_the_basis_is_made_of() -> None:
    case = latent_case(SHAPES["GQA biases"])
    basis = latent_basis(case.layer, case.inputs)
    latents = torch.einsum("re,nte->ntr", case.layer.latent, case.inputs)
    assert_close(basis.white, latents, atol=1e-12)
    assert_close(basis.back, case.layer.latent, atol=0)


def _with_outcome(case: Case) -> tuple[LatentLayer, AttentionLayer]:
    """The layer with values and output refitted, and their expanded form."""
    whole, basis = expanded(case.layer), latent_basis(case.layer, case.inputs)
    scoring = case.scoring
    (fitted,) = refit_outcome(
        0,
        [dataclasses.replace(case.observed, scoring=scoring)],
        [whole],
        asked=queries(whole, scoring, case.inputs),
        inputs=case.inputs,
        shared=(keys(whole, scoring, case.inputs), values(whole, scoring, case.inputs)),
        target=case.observed.outputs,
        basis=basis,
    )
    return with_expanded_values(case.layer, fitted, basis), fitted


@shapes
def test_refitted_values_stay_inside_the_latent(shape: Shape) -> None:
    case = latent_case(shape)
    found, fitted = _with_outcome(case)
    assert fitted.v is not None
    latent = case.layer.latent
    # what is left of the rows of the values beside those of the latent
    left = fitted.v.flatten(0, 1).T
    left = left - latent.T @ torch.linalg.lstsq(latent.T, left).solution
    assert float(left.abs().max()) < 1e-10 * float(fitted.v.abs().max())
    assert float((found.v_up - case.layer.v_up).abs().max()) > 1e-3  # they did change
    for name in ("q", "q_bias", "latent", "k_rope", "k_rope_bias", "k_up"):
        assert getattr(found, name) is getattr(case.layer, name)
    for window, inputs in enumerate(case.inputs):
        turning = case.speeds[list(found.planes)]
        wanted = original_outcome(fitted, inputs, turning, found.scale)
        atol = 1e-10 * float(wanted.abs().max())
        assert_close(case.outcomes(found)[window], wanted, atol=atol)


@shapes
def test_outputs_come_nearer_to_the_original(shape: Shape) -> None:
    case = latent_case(shape)
    target = torch.stack(
        [
            original_outcome(case.original, x, case.speeds, case.layer.scale)
            for x in case.observed.inputs
        ]
    )

    def error(layer: LatentLayer) -> Tensor:
        return (case.outcomes(layer) - target).square().sum()

    with_scores = dataclasses.replace(case, layer=case.refitted())
    for start in (case, with_scores):
        assert error(_with_outcome(start)[0]) < 0.9 * error(start.layer)

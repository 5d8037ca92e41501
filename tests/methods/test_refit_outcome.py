"""Refits of values and outputs against dense least squares; and the solver they share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from convert.methods import refit_outcome as module
from convert.methods.halves import gram
from convert.methods.least_squares import solve, total
from convert.methods.refit_outcome import ValueReader, refit_output, refit_values
from tests.helpers import assert_close
from tests.methods.layers import augmented, causal, randn

N, T, E, HEADS, WIDTH = 3, 9, 5, 3, 2


def _weights(seed: int) -> Tensor:
    """Causal attention weights [N, g, T, T]."""
    scores = randn(N, HEADS, T, T, seed=seed)
    return scores.masked_fill(~causal(T, 0).visible, -torch.inf).softmax(-1)


def _reader(seed: int) -> ValueReader:
    return ValueReader(
        _weights(seed), randn(E, HEADS, WIDTH, seed=seed + 1), randn(N, T, E, seed=seed + 2)
    )


def _design(reader: ValueReader, inputs: Tensor) -> Tensor:
    """What every entry of the value rows adds to every output: [N * T * E, Dv * E']."""
    design = torch.einsum("nhts,nsf,ehd->ntedf", reader.weights, inputs, reader.output)
    return design.flatten(0, 2).flatten(1)


def _ridged(design: Tensor, target: Tensor, start: Tensor, strength: float) -> Tensor:
    """``|design w - target|^2 + strength |w - start|^2`` as one plain least squares problem."""
    root = strength**0.5 * torch.eye(design.shape[1], dtype=design.dtype)
    rows, wanted = torch.cat([design, root]), torch.cat([target, strength**0.5 * start])
    return torch.linalg.lstsq(rows, wanted).solution


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_the_ridge_solution(
    readers: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEPS", 100)
    given = [_reader(10 * seed + 40 * index) for index in range(readers)]
    inputs = randn(N, T, E + 1, seed=seed + 5)
    found = refit_values(given, inputs)
    design = torch.cat([_design(reader, inputs) for reader in given])
    missing = torch.cat([reader.missing.flatten() for reader in given])
    # as many times the mean diagonal, were the inputs of all tokens independent, as each of four
    # tokens has input dims
    power = inputs.square().mean()
    alone = [_design(reader, _one_token(s)) for reader in given for s in range(T)]
    share = 4 * inputs.shape[-1] / (N * T)
    strength = share * float(power * sum(one.square().sum() for one in alone)) / WIDTH
    expected = _ridged(design, missing[:, None], torch.zeros(found.numel(), 1).double(), strength)
    assert_close(found, expected.reshape(found.shape), atol=1e-9)
    assert float(found.abs().max()) > 0.02  # else nothing is tested


def _one_token(place: int) -> Tensor:
    """Inputs [N, T, 1] that are one at one token of each window."""
    inputs = torch.zeros(N, T, 1, dtype=torch.float64)
    inputs[:, place] = 1
    return inputs


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_refitted_values_are_never_further_away(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEPS", steps)
    reader, inputs = _reader(1), randn(N, T, E, seed=5)
    change = _design(reader, inputs) @ refit_values([reader], inputs).flatten()
    left = reader.missing.flatten() - change
    assert float(left.square().sum()) < float(reader.missing.square().sum())


def test_values_that_lack_nothing_stay() -> None:
    reader, inputs = _reader(1), randn(N, T, E, seed=5)
    found = refit_values([dataclasses.replace(reader, missing=0 * reader.missing)], inputs)
    assert_close(found, torch.zeros(WIDTH, E, dtype=torch.float64), atol=0)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [WIDTH, 20], ids=["many tokens", "fewer tokens than dims"])
def test_output_is_the_ridge_solution(width: int, bias: bool, dtype: torch.dtype) -> None:
    heads, target = randn(N, T, HEADS, width, seed=1).to(dtype), randn(N, T, E, seed=2).to(dtype)
    output = randn(E, HEADS, width, seed=3).to(dtype)
    given = randn(E, seed=4).to(dtype) if bias else None
    found, found_bias = refit_output(heads, target, output, given)
    design, start = heads.double().reshape(N * T, -1), output.double().reshape(E, -1)
    if given is not None:
        design, start = augmented(design), torch.cat([start, given.double()[:, None]], 1)
    # a thousandth of the mean power of a column of the design
    strength = 1e-3 * float(design.square().sum()) / design.shape[1]
    expected = _ridged(design, target.double().flatten(0, 1), start.T, strength).T
    atol = 1e-10 if dtype == torch.float64 else 1e-6  # of numbers of order one
    width *= HEADS
    assert_close(found, expected[:, :width].reshape(output.shape).to(dtype), atol=atol)
    if found_bias is None:
        assert not bias
    else:
        assert_close(found_bias, expected[:, width].to(dtype), atol=atol)


@pytest.mark.parametrize("tokens", [T, 1], ids=["many tokens", "fewer tokens than dims"])
def test_heads_that_give_nothing_leave_the_output_as_it_was(tokens: int) -> None:
    heads, target = torch.zeros(N, tokens, HEADS, WIDTH), torch.ones(N, tokens, E)
    output = randn(E, HEADS, WIDTH, seed=3).float()
    assert torch.equal(refit_output(heads, target, output, None)[0], output)


def test_output_that_is_right_stays() -> None:
    heads, output = randn(N, T, HEADS, WIDTH, seed=1), randn(E, HEADS, WIDTH, seed=3)
    bias = randn(E, seed=4)
    target = torch.einsum("nthd,ehd->nte", heads, output) + bias
    found, found_bias = refit_output(heads, target, output, bias)
    assert found_bias is not None
    assert_close(found, output, atol=1e-12)
    assert_close(found_bias, bias, atol=1e-12)


@pytest.mark.parametrize("common", [True, False], ids=["inputs of all", "inputs of each"])
def test_solver_solves_one_ridged_system_for_each_projection(common: bool) -> None:
    count, tokens, width, size = 3, 20, 2, 3
    roots = randn(count, tokens * width, tokens * width, seed=1) / tokens
    inputs, missing = randn(count, tokens, size, seed=2), randn(count, tokens, width, seed=3)
    inputs = inputs[:1] if common else inputs
    moment = gram(randn(count, 5, width, seed=4))

    def metric(made: Tensor) -> Tensor:
        return (gram(roots) @ made.flatten(1)[..., None]).view_as(made)

    found = solve(inputs, metric, missing, moment, ridge=0.3, steps=60)
    for index, root in enumerate(roots):
        given = inputs[0 if common else index]
        design = torch.kron(torch.eye(width).double(), given)  # of [D, E'] for [D, n]
        design = design.reshape(width, tokens, -1).transpose(0, 1).flatten(0, 1)
        strength = 0.3 * size / tokens * given.square().mean() * moment[index].trace() / width
        ridged = (root @ design).T @ (root @ design) + strength * torch.eye(width * size).double()
        expected = torch.linalg.solve(ridged, design.T @ missing[index].flatten())
        assert_close(found[index].flatten(), expected, atol=1e-9)


def test_solver_needs_one_step_where_inputs_are_white_and_the_metric_one_matrix() -> None:
    white = torch.linalg.qr(randn(30, 4, seed=1)).Q[None]
    matrix = gram(randn(1, 9, 3, seed=2) * torch.tensor([1.0, 30.0, 1000.0]))
    missing = randn(1, 30, 3, seed=3)
    options = {"moment": 30 * matrix, "ridge": 1e-3}
    found, exact = (
        solve(white, lambda made: made @ matrix, missing, **options, steps=steps)
        for steps in (1, 50)
    )
    assert_close(found, exact, atol=1e-12)


def test_solver_survives_a_matrix_of_zeros() -> None:
    zeros = torch.zeros(2, 5, 3)
    found = solve(zeros, torch.zeros_like, zeros, torch.zeros(2, 3, 3), ridge=0.1, steps=5)
    assert_close(found, torch.zeros(2, 3, 3), atol=0.0)


def test_solver_survives_a_metric_that_is_rounding_alone() -> None:
    """Of inputs that are all the same the metric is zero, but what is computed may be less."""
    inputs, missing = torch.linalg.qr(randn(20, 3, seed=1)).Q[None], randn(1, 20, 2, seed=2)
    moment = torch.eye(2).double()[None]
    strength = 0.1 * 3 / 20 * float(inputs.square().mean())
    exact = missing.mT @ inputs / strength  # where nothing but the ridge is left
    found = solve(inputs, lambda made: -strength * made, missing, moment, ridge=0.1, steps=5)
    assert found.norm() <= 5 * exact.norm()


def test_sum_is_that_of_all_terms() -> None:
    terms = [randn(2, 3, seed=seed) for seed in range(4)]
    assert_close(total(iter(terms)), torch.stack(terms).sum(0), atol=1e-14)

"""Refits of values and outputs against dense least squares; and the solver they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convert.methods import refit_outcome as module
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
    inputs, rows = randn(N, T, E + 1, seed=seed + 5), randn(WIDTH, E + 1, seed=seed + 6)
    found = refit_values(given, inputs, rows, seed=seed)
    design = torch.cat([_design(reader, inputs) for reader in given])
    target = torch.cat([reader.target.flatten() for reader in given])
    signs = torch.randint(0, 2, (1, *rows.shape), generator=torch.Generator().manual_seed(seed))
    probe = (2 * signs - 1).double().flatten()
    strength = 1e-3 * float((design @ probe).square().sum()) / rows.numel()
    expected = _ridged(design, target[:, None], rows.reshape(-1, 1), strength)
    assert_close(found, expected.reshape(rows.shape), atol=1e-9)
    assert float((found - rows).abs().max()) > 0.1  # else nothing is tested


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_refitted_values_are_never_further_away(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEPS", steps)
    reader, inputs, rows = _reader(1), randn(N, T, E, seed=5), randn(WIDTH, E, seed=6)
    design = _design(reader, inputs)

    def error(rows: Tensor) -> float:
        return float((design @ rows.flatten() - reader.target.flatten()).square().sum())

    assert error(refit_values([reader], inputs, rows, seed=1)) < error(rows)


def test_values_that_are_right_stay() -> None:
    reader, inputs, rows = _reader(1), randn(N, T, E, seed=5), randn(WIDTH, E, seed=6)
    right = (_design(reader, inputs) @ rows.flatten()).reshape(N, T, E)
    found = refit_values([ValueReader(reader.weights, reader.output, right)], inputs, rows, seed=1)
    assert_close(found, rows, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_is_the_ridge_solution(bias: bool, dtype: torch.dtype) -> None:
    heads, target = randn(N, T, HEADS, WIDTH, seed=1).to(dtype), randn(N, T, E, seed=2).to(dtype)
    output = randn(E, HEADS, WIDTH, seed=3).to(dtype)
    given = randn(E, seed=4).to(dtype) if bias else None
    found, found_bias = refit_output(heads, target, output, given)
    design, start = heads.double().reshape(N * T, -1), output.double().reshape(E, -1)
    if given is not None:
        design, start = augmented(design), torch.cat([start, given.double()[:, None]], 1)
    # a thousandth of the mean power of a column of the design
    strength = 1e-3 * float(design.square().sum()) / design.shape[1]
    expected = _ridged(design, target.double().flatten(0, 1), start.T, strength).T
    atol = 1e-10 if dtype == torch.float64 else 1e-6  # of numbers of order one
    width = HEADS * WIDTH
    assert_close(found, expected[:, :width].reshape(output.shape).to(dtype), atol=atol)
    if found_bias is None:
        assert not bias
    else:
        assert_close(found_bias, expected[:, width].to(dtype), atol=atol)


def test_output_that_is_right_stays() -> None:
    heads, output = randn(N, T, HEADS, WIDTH, seed=1), randn(E, HEADS, WIDTH, seed=3)
    bias = randn(E, seed=4)
    target = torch.einsum("nthd,ehd->nte", heads, output) + bias
    found, found_bias = refit_output(heads, target, output, bias)
    assert found_bias is not None
    assert_close(found, output, atol=1e-12)
    assert_close(found_bias, bias, atol=1e-12)


def test_solver_solves_one_ridged_system_for_each_leading_index() -> None:
    matrices = [randn(6, 6, seed=seed) for seed in range(3)]
    normals = torch.stack([(1 + 50 * i) * m @ m.T for i, m in enumerate(matrices)])
    pull, start = randn(3, 2, 3, seed=4), randn(3, 2, 3, seed=5)

    def normal(rows: Tensor) -> Tensor:
        return (normals @ rows.flatten(1)[..., None]).reshape(rows.shape)

    found = solve(normal, pull, start, ridge=0.3, steps=60, seed=7)
    signs = torch.randint(0, 2, (3, 2, 3), generator=torch.Generator().manual_seed(7))
    for index, matrix in enumerate(normals):
        probe = (2 * signs[index] - 1).double().flatten()
        strength = 0.3 * float(probe @ matrix @ probe) / 6
        ridged = matrix + strength * torch.eye(6, dtype=torch.float64)
        wanted = pull[index].flatten() + strength * start[index].flatten()
        expected = torch.linalg.solve(ridged, wanted)
        assert_close(found[index].flatten(), expected, atol=1e-9)


def test_solver_survives_a_matrix_of_zeros() -> None:
    start = randn(2, 3, seed=1).float()
    found = solve(torch.zeros_like, torch.zeros(2, 3), start, ridge=0.1, steps=5, seed=0)
    assert_close(found, start, atol=0.0)


def test_sum_is_that_of_all_terms() -> None:
    terms = [randn(2, 3, seed=seed) for seed in range(4)]
    assert_close(total(iter(terms)), torch.stack(terms).sum(0), atol=1e-14)

"""Roots and leading directions of wide moments, against whole decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convert.methods.spectral import leading, lower_root
from tests.helpers import assert_close
from tests.methods.layers import randn

WIDE = 1100  # wider than what is decomposed as a whole


def _gram(spectrum: Tensor) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    vectors = torch.linalg.qr(randn(len(spectrum), len(spectrum), seed=1)).Q
    return vectors * spectrum @ vectors.T


def _spectra() -> dict[str, Tensor]:
    place = torch.arange(1, WIDE + 1, dtype=torch.float64)
    return {
        "power law": place**-1.0,
        "exponential": 0.98**place,
        "flat": 2 - place / WIDE,
        "low rank": (place <= 40) * (1 + place / WIDE),
        "one far above": place**-1.0 + 1e6 * (place == 1),
        "two values": 1 / (1 + (place > 300).double()),
        "steps": 10.0 ** -(place // 100),
        "nothing": 0 * place,
    }


@pytest.mark.parametrize("count", [90, 250])
@pytest.mark.parametrize("name", _spectra())
def test_leading_energy_is_that_of_the_whole_spectrum(name: str, count: int) -> None:
    spectrum = _spectra()[name]
    gram = _gram(spectrum)
    values, vectors = leading(gram, count)
    whole = float(spectrum.sum())
    best = spectrum.sort(descending=True).values[:count]
    # what is left out may be a three-hundredth more than need be
    atol = max(1e-9 * whole, (whole - float(best.sum())) / 300)
    # of the values as they are returned, and of the subspace as it is
    assert_close(values.sum(), best.sum(), atol=atol)
    assert_close((vectors.T @ gram @ vectors).trace(), values.sum(), atol=1e-9 * whole)
    assert_close(values, best, atol=max(1e-6 * float(best[0]), atol))
    if whole:
        eye = torch.eye(count, dtype=torch.float64)
        assert_close(vectors.T @ vectors, eye, atol=1e-12)


def test_a_flat_spectrum_takes_a_large_basis() -> None:
    """Each step gains little there, and the next one not much less."""
    spectrum = 1.01 - torch.arange(1, 2049, dtype=torch.float64) / 2048
    values, _ = leading(torch.diag(spectrum), 256)
    best = spectrum[:256].sum()
    assert 0 <= float(best - values.sum()) <= float(spectrum.sum() - best) / 300


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 3), (7, 7), (WIDE, 700)])
def test_much_of_a_matrix_is_taken_from_the_whole_of_it(size: int, count: int) -> None:
    spectrum = torch.linspace(3, 1, size, dtype=torch.float64)
    gram = _gram(spectrum)
    values, vectors = leading(gram, count)
    assert_close(values, spectrum[:count], atol=1e-10)
    assert_close(gram @ vectors, vectors * values, atol=1e-10)


def test_leading_directions_are_the_same_every_time() -> None:
    gram = _gram(_spectra()["power law"])
    first = leading(gram, 30)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, leading(gram, 30), strict=True))


@pytest.mark.parametrize("rank", [2, 9])
def test_root_is_lower_triangular_and_floored(rank: int) -> None:
    rows = randn(9, rank, seed=2)
    moment = rows @ rows.T
    root = lower_root(moment, 1e-3)
    assert torch.equal(root, root.tril())
    lifted = moment + 1e-3 * torch.eye(9, dtype=torch.float64)
    assert_close(root @ root.T, lifted, atol=1e-12)
    assert_close(moment, rows @ rows.T, atol=0)

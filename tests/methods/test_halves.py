"""Products of which half is known, against whole ones."""

from __future__ import annotations

import pytest
import torch

from convert.methods.halves import covariance, gram, mirrored, powers, times_lower
from tests.helpers import assert_close
from tests.methods.layers import randn

WIDTHS = [1, 7, 512, 513, 1100]  # up to one block, and beyond
widths = pytest.mark.parametrize("width", WIDTHS)


@widths
def test_inner_products_are_those_of_all_columns(width: int) -> None:
    rows = randn(9, width, seed=1)
    assert_close(gram(rows), torch.einsum("ni,nj->ij", rows, rows), atol=1e-12)
    stacked = randn(2, 3, 4, width, seed=2)
    assert_close(gram(stacked), torch.einsum("abni,abnj->abij", stacked, stacked), atol=1e-12)


@widths
def test_symmetric_products_need_one_half(width: int) -> None:
    rows, root = randn(9, width, seed=1), randn(9, 9, seed=2)
    metric = root @ root.T
    expected = torch.einsum("ni,nm,mj->ij", rows, metric, rows)
    assert_close(mirrored(rows, metric @ rows), expected, atol=1e-10)


@widths
def test_what_is_above_the_diagonal_of_a_lower_root_is_not_read(width: int) -> None:
    rows, root = randn(3, 2, width, seed=1), randn(width, width, seed=2)
    expected = torch.einsum("abi,ij->abj", rows, root.tril())
    assert_close(times_lower(rows, root.tril()), expected, atol=1e-10)


@widths
@pytest.mark.parametrize("white", [False, True], ids=["moment", "white"])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_covariance_is_what_rows_make_of_a_moment(width: int, white: bool, kind: str) -> None:
    rows, root = randn(2, 5, width, seed=1), randn(width, width + 1, seed=2) / width**0.5
    if kind == "complex":
        rows = torch.complex(rows, randn(2, 5, width, seed=3))
    moment = None if white else root @ root.T
    known = torch.eye(width, dtype=rows.dtype) if moment is None else moment.to(rows.dtype)
    expected = torch.einsum("aij,jk,alk->ail", rows, known, rows.conj())
    found = covariance(rows, moment)
    assert found.dtype == rows.dtype
    assert float((found - expected).abs().max()) <= 1e-10
    assert_close(powers(rows, moment), expected.diagonal(dim1=1, dim2=2).real, atol=1e-10)


def test_moments_stay_as_they_are() -> None:
    moment = gram(randn(9, 7, seed=1))
    before = moment.clone()
    covariance(randn(3, 7, seed=2), moment)
    powers(randn(3, 7, seed=2), moment)
    assert torch.equal(moment, before)

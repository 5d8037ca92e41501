"""Refits of queries and keys against dense normal equations, built entry by entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods import refit_scores as module
from convert.methods.attention import Scoring, keys, plane_order, with_head_order
from convert.methods.fitting import Observed, refit_projections
from convert.methods.merge import merge_heads
from convert.methods.refit_scores import Reader, basis_of, refit_queries, refit_scores
from tests.helpers import assert_close
from tests.methods.dense_scores import (
    HEADS,
    D,
    E,
    N,
    T,
    dense_queries,
    divergence,
    fitted_in_turn,
    random_reader,
    rotated_key,
    rotations,
    white_basis,
)
from tests.methods.layers import Shape, augmented, causal, one_by_one, randn, random_layer

PLANES = {"full": 3, "partial": 2, "none": 0}
planes = pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
caps = pytest.mark.parametrize("softcap", [None, 1.5])
windows = pytest.mark.parametrize("window", [None, 3])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough steps for conjugate gradients to end where the dense solution lies."""
    monkeypatch.setattr(module, "STEPS", 120)


@planes
@caps
@windows
@biases
@pytest.mark.usefixtures("converged")
def test_queries_are_the_dense_solution(
    planes: int, softcap: float | None, window: int | None, bias: bool
) -> None:
    scoring = causal(T, planes, window=window, softcap=softcap)
    reader, key = random_reader(scoring, bias=bias, seed=1), randn(N, T, D, seed=9)
    expected = dense_queries(reader, key, seed=5)
    assert float((expected - reader.rows).abs().max()) > 0.1  # else nothing is tested
    refit_queries([reader], key, seed=5)
    assert_close(reader.rows, expected, atol=1e-8 * float(expected.abs().max()))


@planes
@caps
@windows
@biases
@pytest.mark.usefixtures("converged")
def test_queries_and_keys_are_solved_in_turn(
    planes: int, softcap: float | None, window: int | None, bias: bool
) -> None:
    scoring = causal(T, planes, window=window, softcap=softcap)
    readers = [random_reader(scoring, bias=bias, seed=seed) for seed in (1, 11)]
    basis = white_basis(bias=bias, seed=1)
    start = randn(D, E + bias, seed=30)
    copies = [dataclasses.replace(reader) for reader in readers]
    found = refit_scores(readers, basis, start, seed=5)

    expected = fitted_in_turn(copies, basis, start, seed=5)
    assert_close(found, expected, atol=1e-7 * float(expected.abs().max()))
    for reader, copy in zip(readers, copies, strict=True):
        assert_close(reader.rows, copy.rows, atol=1e-7 * float(copy.rows.abs().max()))


@planes
@caps
@windows
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_refits_never_diverge_more(
    planes: int,
    softcap: float | None,
    window: int | None,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Conjugate gradients only descend, and the ridge is nothing at the start."""
    monkeypatch.setattr(module, "STEPS", steps)
    scoring = causal(T, planes, window=window, softcap=softcap)
    readers = [random_reader(scoring, bias=True, seed=seed) for seed in (1, 11)]
    basis = white_basis(bias=True, seed=1)
    inputs, start = basis.inputs, randn(D, E + 1, seed=30)
    before = divergence(readers, rotated_key(inputs, start, scoring))
    copies = [dataclasses.replace(reader) for reader in readers]
    refit_queries(copies, rotated_key(inputs, start, scoring), seed=5)
    between = divergence(copies, rotated_key(inputs, start, scoring))
    key_rows = refit_scores(readers, basis, start, seed=5)
    after = divergence(readers, rotated_key(inputs, key_rows, scoring))
    assert after < between < before


def _observed(
    layer: AttentionLayer, inputs: Tensor, order: Sequence[int], scoring: Scoring
) -> Observed:
    return Observed(
        layer=with_head_order(layer, plane_order(layer)),
        scoring=scoring,
        query_order=tuple(order),
        before=inputs,
        inputs=inputs,
        outputs=inputs,
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dim", [0, 4, 6])
@caps
@windows
def test_what_merges_without_loss_stays(
    interleaved: bool, dim: int, softcap: float | None, window: int | None
) -> None:
    """Keys that are multiples of one another, whose merge is exact: there is nothing to repair."""
    shape = Shape(rope_dim=dim, interleaved=interleaved, biases=("q", "k"), hidden=E)
    layer = random_layer(shape, seed=3)
    assert layer.k is not None
    assert layer.k_bias is not None
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    layer = dataclasses.replace(
        layer, k=factors[:, None, None] * layer.k[0], k_bias=factors[:, None] * layer.k_bias[0]
    )
    groups, order = [(0, 2), (1, 3)], [0, 1, 4, 5, 2, 3, 6, 7]
    (merged,), _ = merge_heads([layer], groups)
    scoring = causal(T, dim // 2, window=window, softcap=softcap)
    inputs = randn(N, T, E, seed=6)
    before = with_head_order(merged, plane_order(layer))
    (after,) = refit_projections(
        0,
        [_observed(layer, inputs, order, scoring)],
        [before],
        inputs,
        None,
        each=one_by_one,
        seed=1,
    )
    for name in ("q", "k", "q_bias", "k_bias"):
        expected = getattr(before, name)
        assert_close(getattr(after, name), expected, atol=1e-8 * float(expected.abs().max()))


def _biased(layer: AttentionLayer, part: str) -> Tensor:
    """[n, D, E] or, with its bias, [n, D, E + 1]; dims in plane order."""
    rows, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
    if bias is not None:
        rows = torch.cat([rows, bias[..., None]], -1)
    return rows[:, plane_order(layer)]


def _original_scores(layer: AttentionLayer, inputs: Tensor, scoring: Scoring) -> Tensor:
    """[N, H, T, T], each query head with a KV head of its own."""
    rotation = rotations(scoring)
    query, key = (
        torch.einsum(
            "tfd,nte,hde->nhtf",
            rotation,
            inputs if getattr(layer, f"{part}_bias") is None else augmented(inputs),
            _biased(layer, part),
        )
        for part in "qk"
    )
    return scoring.scale * query @ key.repeat_interleave(layer.geometry.group, 1).mT


@pytest.mark.parametrize(
    ("interleaved", "dim", "biases"),
    [
        (False, 0, ("q",)),
        (False, 4, ("q", "k")),
        (False, 6, ()),
        (True, 4, ("k",)),
        (True, 6, ("q", "k")),
    ],
)
@pytest.mark.usefixtures("converged")
def test_layers_that_share_are_refitted_slot_by_slot(
    interleaved: bool, dim: int, biases: Sequence[str]
) -> None:
    """A producer with the readers of both layers, then the consumer with inputs of its own."""
    shape = Shape(rope_dim=dim, interleaved=interleaved, biases=biases, hidden=E)
    layers = [random_layer(shape, seed=seed) for seed in (3, 4)]
    groups, order = [(0, 2, 4, 6), (1, 3, 5, 7)], [0, 1, 4, 5, 2, 3, 6, 7]
    merged, _ = merge_heads(layers, groups)
    ready = [with_head_order(layer, plane_order(layers[0])) for layer in merged]
    scoring = causal(T, dim // 2)
    inputs = [randn(N, T, E, seed=6), randn(N, T, E, seed=7)]
    seen = [_observed(*pair, order, scoring) for pair in zip(layers, inputs, strict=True)]
    moved = inputs[1] + 0.1 * randn(N, T, E, seed=8)  # the consumer's in the converted model
    produced = refit_projections(0, seen, ready, inputs[0], None, each=one_by_one, seed=5)
    new_key = keys(produced[0], scoring, inputs[0])
    fitted = refit_projections(
        1, seen, produced, moved, (new_key, new_key), each=one_by_one, seed=5
    )

    bias, key_bias = "q" in biases, "k" in biases
    targets = [
        _original_scores(*pair, scoring)[:, order] for pair in zip(layers, inputs, strict=True)
    ]
    key_basis = basis_of(inputs[0], bias=key_bias)
    for slot in range(2):
        heads = slice(4 * slot, 4 * slot + 4)

        def reader(place: int, given: Tensor, layer: AttentionLayer) -> Reader:
            basis = basis_of(given, bias=bias)
            rows = _biased(layer, "q")[heads]  # noqa: B023
            return Reader(basis, rows, targets[place][:, heads], scoring)  # noqa: B023

        readers = [reader(place, inputs[place], merged[place]) for place in range(2)]
        rows = _biased(merged[0], "k")[slot]
        rows = fitted_in_turn(readers, key_basis, rows, seed=5)
        for expected, place in zip(readers, range(2), strict=True):
            _assert_rows(produced[place], "q", heads, expected.rows)
        _assert_rows(produced[0], "k", slice(slot, slot + 1), rows[None])
        last = reader(1, moved, merged[1])
        last.rows = readers[1].rows
        expected_rows = dense_queries(last, rotated_key(key_basis.inputs, rows, scoring), seed=5)
        _assert_rows(fitted[1], "q", heads, expected_rows)
    assert fitted[0] is produced[0]


def _assert_rows(layer: AttentionLayer, part: str, heads: slice, expected: Tensor) -> None:
    """Compare with weights, and biases in the last column if there are any; all in plane order."""
    found, bias = getattr(layer, part), getattr(layer, f"{part}_bias")
    if bias is not None:
        found = torch.cat([found, bias[..., None]], -1)
    assert_close(found[heads], expected, atol=1e-6 * float(expected.abs().max()))


@biases
def test_basis_makes_inputs_white_and_leads_back(bias: bool) -> None:
    inputs = randn(N, 50, E, seed=1) * torch.logspace(-1, 1, E)
    basis = basis_of(inputs, bias=bias)
    size = E + bias
    flat = basis.white.flatten(0, 1)
    given = augmented(inputs) if bias else inputs
    assert_close(basis.inputs, given, atol=0)
    moment = given.flatten(0, 1).T @ given.flatten(0, 1) / len(flat)
    floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(size, dtype=torch.float64)
    # white, if each direction had the variance of the floor beside its own
    lifted = flat.T @ flat / len(flat) + basis.back @ floor @ basis.back.T
    assert_close(lifted, torch.eye(size, dtype=torch.float64), atol=1e-10)
    rows = randn(3, size, seed=2)
    assert_close(basis.white @ rows.T, given @ (rows @ basis.back).T, atol=1e-10)


@biases
def test_fewer_tokens_than_dims_have_as_many_coordinates(bias: bool) -> None:
    inputs = randn(N, 2, 20, seed=1) * torch.logspace(-1, 1, 20)
    basis = basis_of(inputs, bias=bias)
    given = augmented(inputs) if bias else inputs
    assert_close(basis.inputs, given, atol=0)
    flat, rows = given.flatten(0, 1), randn(3, 2 * N, seed=2)
    assert basis.white.shape == (N, 2, 2 * N)
    assert_close(basis.white @ rows.T, given @ (rows @ basis.back).T, atol=1e-10)
    # the regression of tokens on themselves, from the moment of the dims: one but for the floor
    moment = flat.T @ flat
    floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(len(moment), dtype=torch.float64)
    told = flat @ torch.linalg.solve(moment + floor, flat.T)
    white = basis.white.flatten(0, 1)
    assert_close(white @ white.T / (2 * N), told @ told, atol=1e-10)


def test_refits_to_few_tokens_stay_in_what_they_span() -> None:
    """As if inputs had been given as coordinates in an orthonormal basis of all tokens."""
    inputs, start, target = (
        randn(N, 2, 20, seed=1),
        randn(2, D, 20, seed=2),
        randn(N, 2, 2, 2, seed=3),
    )
    key, scoring = randn(N, 2, D, seed=4), causal(2, 3)
    span = torch.linalg.qr(inputs.flatten(0, 1).T).Q
    few, whole = (
        Reader(basis_of(given, bias=False), rows, target, scoring)
        for given, rows in ((inputs, start), (inputs @ span, start @ span))
    )
    for reader in (few, whole):
        refit_queries([reader], key, seed=5)
        asked = reader.basis.inputs.flatten(0, 1) @ reader.rows.mT
        assert_close(reader.projected(), asked, atol=1e-12)
    expected = start + (whole.rows - start @ span) @ span.T
    assert_close(few.rows, expected, atol=1e-4)
    assert float((few.rows - start).abs().max()) > 0.1


def test_directions_that_do_not_occur_are_left_alone() -> None:
    """A dim that is always zero has no say: what the projection made of it stays."""
    inputs = randn(N, T, E, seed=1)
    inputs[..., 2] = 0
    basis = basis_of(inputs, bias=False)
    assert torch.isfinite(basis.white).all()
    rows = randn(HEADS, D, E, seed=2)
    reader = Reader(basis, rows, randn(N, HEADS, T, T, seed=3), causal(T, 3))
    refit_queries([reader], randn(N, T, D, seed=4), seed=5)
    assert float((reader.rows - rows).abs().max()) > 0.1
    assert_close(reader.rows[..., 2], rows[..., 2], atol=1e-8)


@pytest.mark.usefixtures("converged")
def test_a_reader_of_double_share_counts_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-12)  # its strength is drawn for each reader
    scoring = causal(T, 2)
    one, other = (random_reader(scoring, bias=False, seed=seed) for seed in (1, 11))
    basis, start = white_basis(bias=False, seed=1), randn(D, E, seed=30)

    def keys(*readers: Reader) -> Tensor:
        return refit_scores([dataclasses.replace(r) for r in readers], basis, start, seed=5)

    doubled = keys(one, dataclasses.replace(other, share=2.0))
    assert_close(doubled, keys(one, other, other), atol=1e-6)
    assert float((doubled - keys(one, other)).abs().max()) > 1e-3

"""Refits of queries and keys against dense normal equations, built entry by entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from convert.methods import refit_scores as module
from convert.methods.attention import Scoring, keys, plane_order, with_head_order
from convert.methods.fitting import Observed, refit_projections
from convert.methods.merge import merge_heads
from convert.methods.refit_scores import Basis, Reader, basis_of, refit_queries, refit_scores
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, causal, randn, random_layer

N, T, E, D, HEADS = 3, 8, 4, 6, 2
PLANES = {"full": 3, "partial": 2, "none": 0}
planes = pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
caps = pytest.mark.parametrize("softcap", [None, 1.5])
windows = pytest.mark.parametrize("window", [None, 3])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def one_by_one(function: Callable[[int], None], numbers: range) -> None:
    for number in numbers:
        function(number)


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough steps for conjugate gradients to end where the dense solution lies."""
    monkeypatch.setattr(module, "STEPS", 120)


def _basis(*, bias: bool, seed: int) -> Basis:
    scales = torch.linspace(0.3, 2, E, dtype=torch.float64)
    return basis_of(randn(N, T, E, seed=seed) * scales + 0.5, bias=bias)


def _reader(scoring: Scoring, *, bias: bool, seed: int) -> Reader:
    basis = _basis(bias=bias, seed=seed)
    rows = randn(HEADS, D, basis.inputs.shape[-1], seed=seed + 1)
    return Reader(basis, rows, 2 * randn(N, HEADS, T, T, seed=seed + 2), scoring)


def _rotations(scoring: Scoring) -> Tensor:
    """Rotation matrices [T, D, D] of neighbouring dims."""
    matrices = torch.eye(D, dtype=torch.float64).repeat(T, 1, 1)
    for plane in range(scoring.turn.shape[1]):
        i, j, turn = 2 * plane, 2 * plane + 1, scoring.turn[:, plane]
        matrices[:, i, i] = matrices[:, j, j] = turn.real
        matrices[:, j, i] = turn.imag
        matrices[:, i, j] = -turn.imag
    return matrices


def _metric(reader: Reader) -> Tensor:
    """``diag p - p p^T`` of every attention row, through the slope of the cap: [N, g, T, T, T]."""
    target, scoring = reader.target.clone(), reader.scoring
    slope = torch.ones_like(target)
    if scoring.softcap is not None:
        slope = 1 / torch.cosh(target / scoring.softcap) ** 2
        target = scoring.softcap * torch.tanh(target / scoring.softcap)
    rows = torch.softmax(target.masked_fill(~scoring.visible, -torch.inf), -1)
    hessian = torch.diag_embed(rows) - rows[..., :, None] * rows[..., None, :]
    return slope[..., :, None] * hessian * slope[..., None, :]


def _scores(reader: Reader, key: Tensor) -> Tensor:
    """[N, g, T, T] for rotated keys [N, T, D]."""
    turned = torch.einsum(
        "tfd,nte,gde->ngtf", _rotations(reader.scoring), reader.basis.inputs, reader.rows
    )
    return reader.scoring.scale * turned @ key[:, None].mT


def _divergence(readers: Sequence[Reader], key: Tensor) -> float:
    """Half of the sum of ``d^T (diag p - p p^T) d`` over all attention rows."""
    total = 0.0
    for reader in readers:
        error = _scores(reader, key) - reader.target
        total += 0.5 * float(torch.einsum("ngts,ngtsr,ngtr->", error, _metric(reader), error))
    return total


def _solved(
    jacobian: Tensor, metric: Tensor, target: Tensor, start: Tensor, strength: Tensor
) -> Tensor:
    """Dense ridge solution: jacobian [rows, T, unknowns], metric [rows, T, T], target [rows, T]."""
    normal = torch.einsum("rsi,rsq,rqj->ij", jacobian, metric, jacobian)
    pull = torch.einsum("rsi,rsq,rq->i", jacobian, metric, target)
    ridged = normal + strength * torch.eye(len(normal), dtype=torch.float64)
    return torch.linalg.solve(ridged, pull + strength * start)


def _noise(reader: Reader, seed: int) -> Tensor:
    """Random errors of scores [N, g, T, T]: a root of the metric times signs."""
    target, scoring = reader.target.clone(), reader.scoring
    slope = torch.ones_like(target)
    if scoring.softcap is not None:
        slope = 1 / torch.cosh(target / scoring.softcap) ** 2
        target = scoring.softcap * torch.tanh(target / scoring.softcap)
    shares = torch.softmax(target.masked_fill(~scoring.visible, -torch.inf), -1)
    draws = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, target.shape[1:], generator=draws, dtype=torch.int8).double() - 1
    root = torch.diag_embed(shares.sqrt()) - shares[..., :, None] * shares.sqrt()[..., None, :]
    assert_close(
        slope[..., None] * (root @ root.mT) * slope[..., None, :], _metric(reader), atol=1e-12
    )
    return reader.share**0.5 * slope * (root @ signs[None, ..., None])[..., 0]


def _strength(pull: Tensor, inputs: Tensor) -> Tensor:
    """The ridge for what random errors pull at the outputs [..., D] of a projection."""
    share = 4 * inputs.shape[-1] / inputs[..., 0].numel()
    return share * pull.square().flatten(0, -2).sum(0).mean() * inputs.square().mean()


def _dense_queries(reader: Reader, key: Tensor, seed: int) -> Tensor:
    """The projection of each head, solved for in white coordinates."""
    white, back = reader.basis.white, reader.basis.back
    start = torch.linalg.solve(back.T, reader.rows.mT).mT
    found = [
        _dense_query(reader, key, head, white, start[head], seed) for head in range(len(start))
    ]
    return torch.stack(found) @ back


def _dense_maps(reader: Reader, key: Tensor, seed: int) -> Tensor:
    """The projection of each head after a map [D, D], solved for where queries are white."""
    found = []
    for head, rows in enumerate(reader.rows):
        asked = reader.basis.inputs @ rows.T
        flat = asked.flatten(0, 1)
        moment = flat.T @ flat / len(flat)
        floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(D, dtype=torch.float64)
        root = torch.linalg.cholesky(moment + floor)
        white = torch.linalg.solve(root, asked.mT).mT
        fitted = _dense_query(reader, key, head, white, root, seed)
        found.append(fitted @ torch.linalg.inv(root) @ rows)
    return torch.stack(found)


def _dense_query(
    reader: Reader, key: Tensor, head: int, white: Tensor, start: Tensor, seed: int
) -> Tensor:
    """Rows of one head that read white inputs [N, T, E']."""
    rotation, scale = _rotations(reader.scoring), reader.scoring.scale
    jacobian = torch.einsum("tfd,nsf,nte->ntsde", rotation, key, white) * scale
    pull = torch.einsum("tfd,nsf,nts->ntd", rotation, key, _noise(reader, seed)[:, head]) * scale
    return _solved(
        jacobian.flatten(0, 1).flatten(2),
        _metric(reader)[:, head].flatten(0, 1),
        reader.target[:, head].flatten(0, 1),
        start.flatten(),
        _strength(pull, white),
    ).reshape(start.shape)


def _dense_keys(readers: Sequence[Reader], basis: Basis, rows: Tensor, seed: int) -> Tensor:
    rotation, white = _rotations(readers[0].scoring), basis.white
    jacobians, metrics, targets, pulls = [], [], [], []
    for number, reader in enumerate(readers):
        query = torch.einsum("tfd,nte,gde->ngtf", rotation, reader.basis.inputs, reader.rows)
        query = query * reader.scoring.scale
        jacobian = torch.einsum("ngtf,sfd,nse->ngtsde", query, rotation, white)
        jacobians.append(jacobian.flatten(0, 2).flatten(2))
        metrics.append(reader.share * _metric(reader).flatten(0, 2))
        targets.append(reader.target.flatten(0, 2))
        noise = _noise(reader, seed + number)
        pulls.append(torch.einsum("ngts,ngtf,sfd->nsd", noise, query, rotation))
    system = (torch.cat(jacobians), torch.cat(metrics), torch.cat(targets))
    start = torch.linalg.solve(basis.back.T, rows.mT).mT
    found = _solved(*system, start.flatten(), _strength(sum(pulls, torch.zeros(())), white))
    return found.reshape(start.shape) @ basis.back


def _fitted_in_turn(readers: Sequence[Reader], basis: Basis, rows: Tensor, seed: int) -> Tensor:
    """Maps of queries, keys, queries, all dense; replaces the rows of the readers."""
    scoring = readers[0].scoring
    for number, reader in enumerate(readers):
        reader.rows = _dense_maps(reader, _key(basis.inputs, rows, scoring), seed + number)
    rows = _dense_keys(readers, basis, rows, seed)
    for number, reader in enumerate(readers):
        reader.rows = _dense_queries(reader, _key(basis.inputs, rows, scoring), seed + number)
    return rows


def _key(inputs: Tensor, rows: Tensor, scoring: Scoring) -> Tensor:
    return torch.einsum("tfd,nte,de->ntf", _rotations(scoring), inputs, rows)


@planes
@caps
@windows
@biases
@pytest.mark.usefixtures("converged")
def test_queries_are_the_dense_solution(
    planes: int, softcap: float | None, window: int | None, bias: bool
) -> None:
    scoring = causal(T, planes, window=window, softcap=softcap)
    reader, key = _reader(scoring, bias=bias, seed=1), randn(N, T, D, seed=9)
    expected = _dense_queries(reader, key, seed=5)
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
    readers = [_reader(scoring, bias=bias, seed=seed) for seed in (1, 11)]
    basis = _basis(bias=bias, seed=1)
    start = randn(D, E + bias, seed=30)
    copies = [dataclasses.replace(reader) for reader in readers]
    found = refit_scores(readers, basis, start, seed=5)

    expected = _fitted_in_turn(copies, basis, start, seed=5)
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
    readers = [_reader(scoring, bias=True, seed=seed) for seed in (1, 11)]
    basis = _basis(bias=True, seed=1)
    inputs, start = basis.inputs, randn(D, E + 1, seed=30)
    before = _divergence(readers, _key(inputs, start, scoring))
    copies = [dataclasses.replace(reader) for reader in readers]
    refit_queries(copies, _key(inputs, start, scoring), seed=5)
    between = _divergence(copies, _key(inputs, start, scoring))
    key_rows = refit_scores(readers, basis, start, seed=5)
    after = _divergence(readers, _key(inputs, key_rows, scoring))
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
    rotation = _rotations(scoring)
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
        rows = _fitted_in_turn(readers, key_basis, rows, seed=5)
        for expected, place in zip(readers, range(2), strict=True):
            _assert_rows(produced[place], "q", heads, expected.rows)
        _assert_rows(produced[0], "k", slice(slot, slot + 1), rows[None])
        last = reader(1, moved, merged[1])
        last.rows = readers[1].rows
        expected_rows = _dense_queries(last, _key(key_basis.inputs, rows, scoring), seed=5)
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
    one, other = (_reader(scoring, bias=False, seed=seed) for seed in (1, 11))
    basis, start = _basis(bias=False, seed=1), randn(D, E, seed=30)

    def keys(*readers: Reader) -> Tensor:
        return refit_scores([dataclasses.replace(r) for r in readers], basis, start, seed=5)

    doubled = keys(one, dataclasses.replace(other, share=2.0))
    assert_close(doubled, keys(one, other, other), atol=1e-6)
    assert float((doubled - keys(one, other)).abs().max()) > 1e-3

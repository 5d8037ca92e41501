"""Plane algebra: what commutes with RoPE, and that no other merge of its kind loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convert.layer import Rope
from convert.planes import (
    join,
    key_covariance,
    merge_complex,
    merge_real,
    planes_of,
    real_covariance,
    split,
)
from tests.helpers import assert_close, assert_equal

E = 7


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _complex(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(_random(*shape, seed=seed), _random(*shape, seed=seed + 100))


def _positive(size: int, seed: int = 0) -> Tensor:
    root = _random(size, size, seed=seed)
    return root @ root.T


def _lost_by(members: Tensor, weights: Tensor, moment: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    """``a_h E|k_h - c_h z|^2`` written out: [g, P] from members [g, P, E]."""
    error = members - c[..., None] * rows
    return weights * ((error @ moment.to(error.dtype)) * error.conj()).real.sum(-1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dim", [0, 4, 10])
def test_split_and_join_are_inverse(interleaved: bool, dim: int) -> None:
    planes = planes_of(Rope(dim=dim, interleaved=interleaved, theta=1e4), 10)
    heads = _random(3, 10, E)
    turning, rest = split(heads, planes)
    assert turning.shape == (3, dim // 2, E)
    assert rest.shape == (3, 10 - dim, E)
    assert_equal(join(turning, rest, planes), heads)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_complex_factors_commute_with_the_stock_rotation(interleaved: bool) -> None:
    from transformers.models.cohere.modeling_cohere import rotate_half as rotate_pairs
    from transformers.models.llama.modeling_llama import rotate_half

    dim, positions = 8, torch.arange(5.0, dtype=torch.float64)
    planes = planes_of(Rope(dim=dim, interleaved=interleaved, theta=1e4), dim)
    angles = positions[:, None] * 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    both = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    turn = rotate_pairs if interleaved else rotate_half

    def rotated(head: Tensor) -> Tensor:  # [D, T] -> [T, D]
        return head.T * both.cos() + turn(head.T) * both.sin()

    query, key, factor = _random(1, dim, 5), _random(1, dim, 5, seed=1), _complex(4, seed=2)

    def multiplied(head: Tensor, by: Tensor) -> Tensor:
        turning, rest = split(head, planes)
        return join(turning * by[:, None], rest, planes)

    left = rotated(multiplied(query, factor.conj())[0]) @ rotated(key[0]).T
    right = rotated(query[0]) @ rotated(multiplied(key, factor)[0]).T
    assert_close(left, right, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_coefficients_lose_less(seed: int) -> None:
    members, weights = _complex(4, 3, E, seed=seed), _random(4, 3, seed=seed).square()
    moment = _positive(E, seed)
    merged = merge_complex(members, weights, moment)
    of_members = _lost_by(members, weights, moment, merged.maps, merged.rows)
    assert_close(merged.lost, of_members.sum(1), atol=1e-9 * float(of_members.sum()))
    power = _lost_by(members, weights, moment, merged.maps, torch.zeros_like(merged.rows))
    assert_close(merged.total, power.sum(1), atol=1e-9 * float(power.sum()))
    ours = of_members.sum(0)
    one = torch.ones(4, 3, dtype=torch.complex128)
    phase = merged.maps / merged.maps.abs()
    real = merged.maps.real.to(torch.complex128)
    rivals = {"mean": one, "phases": phase, "real": real, "random": _complex(4, 3, seed=seed + 7)}
    for name, c in rivals.items():
        norm = (weights * c.abs().square()).sum(0)
        best = torch.einsum("gp,gpe->pe", weights * c.conj(), members) / norm[:, None]
        theirs = _lost_by(members, weights, moment, c, best).sum(0)
        assert (ours <= theirs + 1e-9 * theirs.abs()).all(), name
    first = _lost_by(members, weights, moment, one, members[0]).sum(0)
    assert (ours <= first * (1 + 1e-9)).all()


def test_merge_agrees_with_a_brute_force_optimiser() -> None:
    members, weights, moment = _complex(3, 1, E), _random(3, 1).square(), _positive(E)
    c, z = _random(3, 1, 2, seed=3).requires_grad_(), _random(1, E, 2, seed=4).requires_grad_()
    optimiser = torch.optim.LBFGS([c, z], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        parts = torch.view_as_complex(c), torch.view_as_complex(z)
        loss = _lost_by(members, weights, moment, *parts).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimiser.step(closure)
    best = float(merge_complex(members, weights, moment).lost.sum())
    assert float(closure().detach()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_real_merge_loses_what_it_says_and_least(seed: int) -> None:
    members, moment = _random(3, 4, E, seed=seed), _positive(E, seed)
    metrics = torch.stack([_positive(4, seed + i) for i in range(3)])
    merged = merge_real(members, metrics, moment)

    def lost(maps: Tensor, rows: Tensor) -> Tensor:
        error = members - maps @ rows
        return torch.einsum("hae,ef,hbf,hab->h", error, moment, error, metrics)

    # the inverse roots of the metrics are floored at 1e-12 of the largest eigenvalue
    ours = float(merged.lost.sum())
    assert_close(merged.lost, lost(merged.maps, merged.rows), atol=1e-6 * ours)
    power = lost(merged.maps, torch.zeros_like(merged.rows))
    assert_close(merged.total, power, atol=1e-6 * float(power.sum()))
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert ours <= float(lost(identity, members.mean(0)).sum())
    assert ours <= float(lost(identity, members[0]).sum())
    for other in range(20):
        step = 1e-3 * _random(4, E, seed=other)
        assert ours <= float(lost(merged.maps, merged.rows + step).sum()) * (1 + 1e-6)


def test_copies_merge_without_loss_whatever_their_weights() -> None:
    one, block = _complex(1, 3, E), _random(1, 4, E)
    weights = torch.tensor([[1.0, 0.0, 5.0]] * 2 + [[0.0, 0.0, 2.0]], dtype=torch.float64)
    merged = merge_complex(one.expand(3, -1, -1), weights, None)
    assert_close(merged.maps[..., None] * merged.rows, one.expand(3, -1, -1), atol=1e-12)
    metrics = torch.stack([_positive(4), torch.zeros(4, 4, dtype=torch.float64), _positive(4, 1)])
    still = merge_real(block.expand(3, -1, -1), metrics, None)
    assert float(still.lost.abs().sum()) <= 1e-9 * float(still.total.sum())


def test_covariances_are_those_of_the_merges() -> None:
    members, weights, moment = _complex(4, 3, E), _random(4, 3).square(), _positive(E)
    covariance = key_covariance(members, weights, moment)
    lost = torch.linalg.eigvalsh(covariance)[:, :-1].sum()
    merged = merge_complex(members, weights, moment)
    assert float(lost) == pytest.approx(float(merged.lost.sum()))
    blocks, metrics = _random(4, 2, E), torch.stack([_positive(2, i) for i in range(4)])
    flat = real_covariance(blocks, metrics, moment).reshape(8, 8)
    expected = merge_real(blocks, metrics, moment)
    beyond = float(torch.linalg.eigvalsh(flat)[:-2].sum())
    assert beyond == pytest.approx(float(expected.lost.sum()))

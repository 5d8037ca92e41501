"""The factorisation: no other latent of its rank loses less of keys and values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convert.methods.latent import Factored, factored, value_gram
from tests.helpers import assert_close
from tests.methods.layers import (
    Shape,
    augmented,
    correlated,
    inputs_of,
    randn,
    random_layer,
)
from tests.methods.references import causal_weights, positive

SAMPLES = 40


@dataclass(frozen=True, slots=True)
class Problem:
    """A factorisation on samples: keys [H, D, E'], values [Hkv, Dv, E'] and their metrics."""

    keys: Tensor
    values: Tensor
    key_metric: Tensor
    gram: Tensor
    samples: Tensor

    def solved(self, rank: int, *, centred: bool) -> Factored:
        return factored(
            self.keys,
            self.values,
            key_metric=self.key_metric,
            value_gram=self.gram,
            moment=inputs_of([self.samples]).own[0],
            rank=rank,
            centred=centred,
        )

    def lost(self, latents: Tensor, *, centred: bool) -> Tensor:
        """What the best linear maps of latents [n, R] lose, by regression on the samples."""
        wanted_keys = torch.einsum("hde,te->thd", self.keys[..., :-1], self.samples)
        wanted_values = torch.einsum("hde,te->thd", self.values[..., :-1], self.samples).flatten(1)
        if centred:
            latents, wanted_keys, wanted_values = (
                part - part.mean(0) for part in (latents, wanted_keys, wanted_values)
            )

        def left(wanted: Tensor) -> Tensor:
            maps = torch.linalg.lstsq(latents, wanted).solution
            return wanted - latents @ maps

        keys = left(wanted_keys.flatten(1)).view(wanted_keys.shape)
        values = left(wanted_values)
        lost = torch.einsum("thd,hde,the->", keys, self.key_metric, keys)
        return (lost + torch.einsum("ta,ab,tb->", values, self.gram, values)) / len(keys)


def _problem(seed: int) -> Problem:
    heads, kv_heads, width, value, hidden = 4, 2, 3, 2, 7
    return Problem(
        keys=randn(heads, width, hidden + 1, seed=seed),
        values=randn(kv_heads, value, hidden + 1, seed=seed + 1),
        key_metric=torch.stack([positive(width, seed + 2 + h) for h in range(heads)]),
        gram=positive(kv_heads * value, seed + 9),
        samples=correlated(1, SAMPLES, hidden, seed=seed + 10)[0],
    )


@pytest.mark.parametrize("seed", [100, 200])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 6, 7])
def test_no_other_latent_loses_less(rank: int, centred: bool, seed: int) -> None:
    problem = _problem(seed)
    found = problem.solved(rank, centred=centred)
    lost = problem.lost(problem.samples @ found.latent.T, centred=centred)
    assert abs(float(lost) - found.lost) < 1e-10 * found.energy
    if rank == 7:
        return
    for other in range(30):
        # of any kind, and small steps from the best
        for latent in (
            randn(rank, 7, seed=other),
            found.latent + 0.05 * randn(rank, 7, seed=other) * found.latent.abs().mean(),
        ):
            assert problem.lost(problem.samples @ latent.T, centred=centred) > lost


@pytest.mark.parametrize("seed", [100, 200])
@pytest.mark.parametrize("centred", [True, False])
def test_what_is_kept_is_that_of_a_two_sided_svd(centred: bool, seed: int) -> None:
    """Of ``A^(1/2) W C^(1/2)``; its truncation gives the best W of lower rank."""
    problem, rank = _problem(seed), 3
    found = problem.solved(rank, centred=centred)
    samples = problem.samples - (problem.samples.mean(0) if centred else 0)
    root_c = torch.linalg.cholesky(samples.T @ samples / SAMPLES)  # any root will do
    weight = torch.cat(
        [problem.keys[..., :-1].flatten(0, 1), problem.values[..., :-1].flatten(0, 1)]
    )
    metric = torch.block_diag(*problem.key_metric, problem.gram)
    root_a = torch.linalg.cholesky(metric).T
    left, values, right = torch.linalg.svd(root_a @ weight @ root_c, full_matrices=False)
    assert_close(found.kept, values[:rank].square(), atol=1e-10 * float(values[0] ** 2))
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-10)
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    best = torch.linalg.solve(root_a, truncated) @ torch.linalg.inv(root_c)
    up = torch.cat([found.k_up.flatten(0, 1), found.v_up.flatten(0, 1)])
    assert_close(up @ found.latent, best, atol=1e-9 * float(best.abs().max()))


@pytest.mark.parametrize("centred", [True, False])
def test_latents_are_white_and_their_maps_regressions(centred: bool) -> None:
    problem, rank = _problem(300), 3
    found = problem.solved(rank, centred=centred)
    samples = problem.samples - (problem.samples.mean(0) if centred else 0)
    latents = samples @ found.latent.T
    assert_close(latents.T @ latents / SAMPLES, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    for up, rows in ((found.k_up, problem.keys), (found.v_up, problem.values)):
        wanted = samples @ rows[..., :-1].flatten(0, 1).T
        maps = torch.linalg.lstsq(latents, wanted).solution.T
        assert_close(up.flatten(0, 1), maps, atol=1e-9 * float(maps.abs().max()))


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_value_is_exact_at_any_rank(rank: int) -> None:
    """What a latent leaves out of the values has no mean; without constants only the bias is."""
    problem = _problem(400)
    wanted = torch.einsum("hde,te->thd", problem.values, augmented(problem.samples))
    found = problem.solved(rank, centred=True)
    latents = problem.samples @ found.latent.T
    read = torch.einsum("hdr,tr->thd", found.v_up, latents) + found.v_constant
    assert_close(read.mean(0), wanted.mean(0), atol=1e-10)
    found = problem.solved(rank, centred=False)
    assert_close(found.v_constant, problem.values[..., -1], atol=1e-12)


def test_means_of_inputs_cost_no_rank() -> None:
    """Inputs that vary in two directions about a far mean: rank two is exact."""
    problem = _problem(500)
    samples = randn(SAMPLES, 2, seed=1) @ randn(2, 7, seed=2) + 5 * randn(7, seed=3)
    problem = dataclasses.replace(problem, samples=samples)
    centred, whole = problem.solved(2, centred=True), problem.solved(2, centred=False)
    assert centred.lost < 1e-7 * centred.energy  # the floor of the variances
    assert whole.lost > 1e-3 * centred.energy


@pytest.mark.parametrize(("kv_heads", "group"), [(4, 1), (2, 2), (1, 4)])
def test_value_gram_is_what_errors_add_up_to(kv_heads: int, group: int) -> None:
    """Errors of the values of all tokens, through weights and output to the residual stream."""
    shape = Shape(kv_heads=kv_heads, group=group)
    layer = random_layer(shape, seed=2)
    heads, width = layer.geometry.heads, shape.value_dim
    assert layer.o is not None
    together = positive(heads, 3)
    found = value_gram(layer, together)
    expected = torch.zeros(kv_heads * width, kv_heads * width, dtype=torch.float64)
    for h in range(heads):
        for g in range(heads):
            for d in range(width):
                for f in range(width):
                    row, column = (h // group) * width + d, (g // group) * width + f
                    both = layer.o[:, h, d] @ layer.o[:, g, f]
                    expected[row, column] += together[h, g] * both
    assert_close(found, expected, atol=1e-10 * float(expected.abs().max()))


def test_value_gram_is_the_mean_error_of_the_outcome() -> None:
    """White errors, the same for all tokens but not for all dims: brute force by samples of them.

    The mean is exact, since all signs of all errors are gone through.
    """
    shape, tokens = Shape(kv_heads=2, group=2, value_dim=2), 3
    layer = random_layer(shape, seed=2)
    mixing = causal_weights(randn(4, tokens, tokens, seed=3))
    together = torch.einsum("hts,gts->hg", mixing, mixing)
    gram = value_gram(layer, together)
    direction = randn(2, 2, seed=4)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * tokens).double()
    errors = torch.einsum("xs,gd->xsgd", signs, direction).repeat_interleave(2, 2)
    moved = torch.einsum("hts,xshd,ehd->xte", mixing, errors, layer.o)
    found = direction.flatten() @ gram @ direction.flatten()
    assert_close(found, moved.square().sum((1, 2)).mean(), atol=1e-10 * float(found))

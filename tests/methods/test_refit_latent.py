"""Refits of a latent layer against dense least squares on scores from the formula of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods import refit_latent as module
from convert.methods import refit_scores as scores_module
from convert.methods.attended import attended
from convert.methods.attention import Scoring, keys, values
from convert.methods.cut import kept_components, lost_without_turn
from convert.methods.fitting import Observed, refit_outcome, second_moments
from convert.methods.latent import factored, latent_form, still_keys, value_gram, with_idle_pairs
from convert.methods.mixing import mixture, query_energy, rows_of
from convert.methods.normed import factored_whole, normed_form
from convert.methods.refit_latent import (
    Reading,
    expanded,
    latent_basis,
    refit_latent_scores,
    with_expanded_values,
)
from convert.methods.refit_scores import Basis, basis_of
from tests.helpers import assert_close
from tests.methods.layers import Shape, randn, random_layer
from tests.methods.references import (
    EPS,
    NORMS,
    causal_weights,
    frequencies,
    heads_of,
    key_factors_of,
    latent_outcome,
    latent_scores,
    normed,
    observed_of,
    original_outcome,
    original_scores,
    with_norms,
)

N, T, E, PAIRS, RANK, RIDGE = 3, 9, 7, 2, 3, 0.05
SHAPES = {
    "MHA": Shape(kv_heads=2, group=1, head_dim=4, hidden=E),
    "GQA biases": Shape(kv_heads=2, group=2, hidden=E, biases=("q", "k", "v", "o")),
    "interleaved": Shape(kv_heads=3, group=1, hidden=E, biases=("q",), interleaved=True),
    "NoPE": Shape(kv_heads=2, group=1, head_dim=4, hidden=E, rope_dim=0, biases=("k",)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
NORMED = {
    "MHA full": ("MHA", "full"),
    "GQA biases shared": ("GQA biases", "shared"),
    "interleaved layer": ("interleaved", "layer"),
    "NoPE plus one": ("NoPE", "plus one"),
}
normed_shapes = pytest.mark.parametrize(
    ("shape", "norm"),
    [(SHAPES[shape], NORMS[norm]) for shape, norm in NORMED.values()],
    ids=NORMED,
)
all_shapes = pytest.mark.parametrize(
    ("shape", "norm"),
    [
        *((shape, None) for shape in SHAPES.values()),
        *((SHAPES[shape], NORMS[norm]) for shape, norm in NORMED.values()),
    ],
    ids=[*SHAPES, *NORMED],
)


def one_by_one(function: Callable[[int], None], numbers: range) -> None:
    for number in numbers:
        function(number)


@dataclass(frozen=True, slots=True)
class Case:
    """An original layer, what it did, and its latent form; inputs of both differ a little."""

    original: AttentionLayer
    observed: Observed
    layer: LatentLayer
    scoring: Scoring
    inputs: Tensor
    speeds: Tensor
    norm: QkNorm | None

    def targets(self) -> Tensor:
        """[N, H, T, T] scores of the original."""
        return torch.stack(
            [
                original_scores(self.original, x, self.speeds, self.layer.scale, self.norm)
                for x in self.observed.inputs
            ]
        )

    def scores(self, layer: LatentLayer) -> Tensor:
        """[N, H, T, T]."""
        return torch.stack([latent_scores(layer, x, self.speeds, self.norm) for x in self.inputs])

    def outcomes(self, layer: LatentLayer) -> Tensor:
        """[N, T, E]."""
        return torch.stack([latent_outcome(layer, x, self.speeds) for x in self.inputs])

    def refitted(self) -> LatentLayer:
        reading = Reading(
            layer=self.layer, observed=self.observed, scoring=self.scoring, inputs=self.inputs
        )
        (found,) = refit_latent_scores([reading], self.inputs, each=one_by_one, seed=5)
        return found


def _case(
    shape: Shape, norm: QkNorm | None = None, *, rank: int = RANK, pairs: int = PAIRS
) -> Case:
    original = with_norms(random_layer(shape, seed=2), norm, seed=6)
    assert original.q is not None
    original = dataclasses.replace(original, q=0.3 * original.q)
    before = randn(N, T, E, seed=3) + 0.3
    observed = observed_of(original, before, norm=norm, norm_eps=EPS)
    moment, rows = second_moments([before]).own[0], rows_of(original, norm)
    weights = query_energy(rows, moment).reshape(shape.kv_heads, shape.group, rows.planes).sum(1)
    components = mixture(rows, moment, weights).of(rows)
    seen = attended(observed, components)
    (kept,) = kept_components([lost_without_turn(seen)], pairs, "greedy", common=False)
    factor, form = (factored, latent_form) if norm is None else (factored_whole, normed_form)
    found = factor(
        still_keys(rows, components, seen.turn, kept, 1.0),
        rows.v,
        key_metric=seen.queries,
        value_gram=value_gram(original, seen.values),
        moment=moment,
        rank=rank,
    )
    scale = observed.scoring.scale
    layer = form(original, rows, components, kept=kept, factored=found, scale=scale)
    turn = observed.scoring.turn[:, list(layer.planes)]
    return Case(
        original=original,
        observed=observed,
        layer=layer,
        scoring=dataclasses.replace(observed.scoring, turn=turn),
        inputs=before + 0.1 * randn(N, T, E, seed=4),
        speeds=frequencies(rows.planes),
        norm=norm,
    )


def _divergence(case: Case, layer: LatentLayer) -> Tensor:
    """Mean KL divergence of the attention rows from those of the original."""
    truth, found = causal_weights(case.targets()), causal_weights(case.scores(layer))
    return torch.where(truth > 0, truth * (truth / found).log(), 0.0).sum(-1).mean()


@dataclass(slots=True)
class Unknowns:
    """The two maps of one head as the refit sees them, rotary dims first.

    With a norm the first reads the normed queries of the head.
    """

    case: Case
    head: int
    basis: Basis
    query: Tensor  # [D, E']; with a norm [Dr + Dn, Dn]
    up: Tensor  # [Dn, R]

    @property
    def noise(self) -> Tensor:
        """Random errors of its scores [N, T, T]."""
        return _noise(self.case, self.head)

    def layer(self, query: Tensor, up: Tensor) -> LatentLayer:
        """The latent layer with these maps for its head."""
        layer, head = self.case.layer, self.head
        if layer.q_rope is not None:
            rotary, still = query.split([layer.geometry.rope_dim, layer.geometry.nope_dim])
            q_rope, k_up = layer.q_rope.clone(), layer.k_up.clone()
            q_rope[head], k_up[head] = rotary, still.T @ up
            return dataclasses.replace(layer, q_rope=q_rope, k_up=k_up)
        rows = torch.roll(query, -layer.geometry.rope_dim, 0)
        q, k_up = layer.q.clone(), layer.k_up.clone()
        q[head], k_up[head] = rows[:, :E], up
        if layer.q_bias is None:
            return dataclasses.replace(layer, q=q, k_up=k_up)
        bias = layer.q_bias.clone()
        bias[head] = rows[:, E]
        return dataclasses.replace(layer, q=q, q_bias=bias, k_up=k_up)

    def scores(self, query: Tensor, up: Tensor) -> Tensor:
        """[N, T, T] of the head."""
        return self.case.scores(self.layer(query, up))[:, self.head]

    def fit_map(self) -> None:
        """A map of the queries as they are, solved for where they are white."""
        asked = self.basis.inputs @ self.query.T
        flat = asked.flatten(0, 1)
        moment = flat.T @ flat / len(flat)
        floor = 1e-6 * moment.square().sum().sqrt() * torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment + floor)
        away = torch.linalg.inv(root)
        before = self.query
        found = _solve(
            self.case.targets()[:, self.head],
            lambda change: self.scores(change @ away @ before, self.up),
            root,
            asked @ away.T,
            self.noise,
            "ntr,ntru->ntu",
        )
        self.query = found @ away @ before

    def fit_query(self) -> None:
        back = self.basis.back
        found = _solve(
            self.case.targets()[:, self.head],
            lambda query: self.scores(query @ back, self.up),
            torch.linalg.solve(back.T, self.query.T).T,
            self.basis.white,
            self.noise,
            "ntr,ntru->ntu",
        )
        self.query = found @ back

    def fit_up(self) -> None:
        layer = self.case.layer
        latents = self.case.inputs @ layer.latent.T
        power = (latents - latents.mean((0, 1))).square().mean()
        if self.case.norm is not None:
            assert layer.latent_bias is not None
            factors = [key_factors_of(layer, self.case.norm, x) for x in self.case.inputs]
            own = self.head * factors[0].shape[1] // layer.geometry.heads
            latents = torch.stack(factors)[..., own, None] * (latents + layer.latent_bias)
            power = latents.square().mean()
        self.up = _solve(
            self.case.targets()[:, self.head],
            lambda up: self.scores(self.query, up),
            self.up,
            latents,
            self.noise,
            "ntr,ntru->nru",
            power=power,
        )


def _noise(case: Case, head: int) -> Tensor:
    """Random errors of the scores of a head [N, T, T]: a root of their metric times signs."""
    shares = causal_weights(case.targets()[:, head])
    draws = torch.Generator().manual_seed(5 + head)
    signs = 2 * torch.randint(2, (1, T, T), generator=draws, dtype=torch.int8)[0].double() - 1
    root = torch.diag_embed(shares.sqrt()) - shares[..., :, None] * shares.sqrt()[..., None, :]
    return (root @ signs[..., None])[..., 0]


def _solve(
    target: Tensor,
    of: Callable[[Tensor], Tensor],
    start: Tensor,
    inputs: Tensor,
    noise: Tensor,
    pull: str,
    power: Tensor | None = None,
) -> Tensor:
    """Dense least squares of scores that are affine in a projection [D, E'], with the ridge.

    The error of each row of scores counts by the square root of ``diag p - p p^T``. The ridge is
    some part of what random errors pull at the projected inputs [N, T, E'] of each token, times the
    power of inputs, of which a constant may be left out.
    """
    shares = causal_weights(target)
    root = shares.sqrt()[..., None] * (torch.eye(T).double() - shares[..., None, :])
    nothing = of(torch.zeros_like(start))
    units = torch.eye(start.numel(), dtype=torch.float64).view(-1, *start.shape)
    plain = torch.stack([of(unit) - nothing for unit in units], -1)
    design = torch.einsum("...tsr,...tru->...tsu", root, plain).flatten(0, -2)
    wanted = torch.einsum("...tsr,...tr->...ts", root, target - nothing).flatten()
    # what the outputs of a token are pulled by, which comes times each of its inputs
    pulled = torch.einsum(pull, noise, plain).unflatten(-1, start.shape).square().sum(-1)
    pulled = (pulled / inputs.square().sum(-1, keepdim=True)).sum((0, 1)).mean()
    share = RIDGE * start.shape[-1] / (N * T)
    strength = share * pulled * (inputs.square().mean() if power is None else power)
    ridge = strength.sqrt() * torch.eye(start.numel(), dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([design, ridge]),
        torch.cat([wanted, strength.sqrt() * start.flatten()])[:, None],
    ).solution
    return solution.view(start.shape)


def _with_rotary_key(case: Case) -> LatentLayer:
    """The layer with the best rotary key for the queries of all heads."""
    layer, biased = case.layer, case.layer.k_rope_bias is not None
    basis = basis_of(case.inputs, bias=biased)
    start = layer.k_rope
    if layer.k_rope_bias is not None:
        start = torch.cat([start, layer.k_rope_bias[:, None]], 1)

    def of(white: Tensor) -> LatentLayer:
        rows = white @ basis.back
        bias = rows[:, E] if biased else None
        return dataclasses.replace(layer, k_rope=rows[:, :E], k_rope_bias=bias)

    heads = range(case.original.geometry.heads)
    found = _solve(
        case.targets(),
        lambda white: case.scores(of(white)),
        torch.linalg.solve(basis.back.T, start.T).T,
        basis.white,
        torch.stack([_noise(case, head) for head in heads], 1),
        "nhtr,nhtru->nru",
    )
    return of(found)


def _unknowns(case: Case, head: int) -> Unknowns:
    layer, biased = case.layer, case.layer.q_bias is not None
    if layer.q_rope is not None:
        heads = [normed(heads_of(layer, "q", x), case.norm, layer.q_norm) for x in case.inputs]
        basis = basis_of(torch.stack(heads)[:, :, head], bias=False)
        same = torch.eye(layer.geometry.nope_dim, dtype=torch.float64)
        query = torch.cat([layer.q_rope[head], same])
        return Unknowns(case, head, basis, query, layer.k_up[head])
    basis = basis_of(case.inputs, bias=biased)
    rows = layer.q[head]
    if layer.q_bias is not None:
        rows = torch.cat([rows, layer.q_bias[head][:, None]], 1)
    query = torch.roll(rows, layer.geometry.rope_dim, 0)
    return Unknowns(case, head, basis, query, layer.k_up[head])


@all_shapes
def test_each_fit_is_the_minimum_of_its_own_quadratic(
    shape: Shape, norm: QkNorm | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of queries; the rotary key; the map from the latent to keys; queries of each head."""
    for name, value in (("STEPS", 240), ("RIDGE", RIDGE)):
        monkeypatch.setattr(scores_module, name, value)
        monkeypatch.setattr(module, name, value)
    case = _case(shape, norm)
    found = case.refitted()
    each = [_unknowns(case, head) for head in range(case.original.geometry.heads)]
    for dense in each:
        dense.case, start = case, dense.query
        dense.fit_map()
        assert float((dense.query - start).abs().max()) > 0.01  # else nothing is tested
        case = dataclasses.replace(case, layer=dense.layer(dense.query, dense.up))
    if shape.rope_dim != 0:
        start = case.layer.k_rope
        case = dataclasses.replace(case, layer=_with_rotary_key(case))
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
    case = _case(shape, norm)
    found = case.refitted()
    before, after = _divergence(case, case.layer), _divergence(case, found)
    assert 0 < after < 0.9 * before
    standing = ["geometry", "latent", "latent_bias", "v_up", "o", "o_bias", "planes", "k"]
    for name in standing if norm is None else [*standing, "q", "q_bias", "k_bias", "q_norm"]:
        assert getattr(found, name) is getattr(case.layer, name)


@normed_shapes
def test_normed_scores_that_are_right_already_stay(shape: Shape, norm: QkNorm) -> None:
    """With all components rotary, whatever the latent is."""
    case = _case(shape, norm, rank=E + 1, pairs=shape.kv_heads * shape.rope_dim // 2)
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
    case = _case(shape)
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
    case = _case(shape)
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
    case = _case(SHAPES["GQA biases"])
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
        inputs=case.inputs,
        shared=(keys(whole, scoring, case.inputs), values(whole, scoring, case.inputs)),
        target=case.observed.outputs,
        basis=basis,
    )
    return with_expanded_values(case.layer, fitted, basis), fitted


@shapes
def test_refitted_values_stay_inside_the_latent(shape: Shape) -> None:
    case = _case(shape)
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
    case = _case(shape)
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

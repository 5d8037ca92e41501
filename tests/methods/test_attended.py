"""What attention makes of keys and values, against sums over queries, keys and heads one by one."""

from __future__ import annotations

import cmath
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, QkNorm
from convert.methods import attended as module
from convert.methods.attended import Attended, attended, presumed
from convert.methods.cut import lost_without_turn
from convert.methods.fitting import Observed
from convert.methods.mixing import Mixed, mixture, query_energy, rows_of
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, inputs_of, randn, random_layer
from tests.methods.references import (
    EPS,
    NORMS,
    causal_weights,
    frequencies,
    heads_of,
    key_factors_of,
    normed,
    observed_of,
    original_scores,
    pairs_of,
    with_norms,
)

N, T = 2, 6
SHAPES = {
    "MHA": Shape(kv_heads=3, group=1),
    "GQA": Shape(kv_heads=2, group=2, biases=("q", "k", "v", "o"), interleaved=True),
    "MQA": Shape(kv_heads=1, group=3, rope_dim=6, biases=("k", "v")),
    "NoPE": Shape(kv_heads=2, group=2, rope_dim=0, biases=("q",)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ROTARY = {name: shape for name, shape in SHAPES.items() if shape.rope_dim}
rotary = pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)


@dataclass(frozen=True, slots=True)
class Case:
    layer: AttentionLayer
    mixed: Mixed
    observed: Observed


def _case(shape: Shape, **options: Any) -> Case:
    norm = options.get("norm")
    layer = with_norms(_smaller(random_layer(shape, seed=2)), norm, seed=6)
    inputs = 0.7 * randn(N, T, shape.hidden, seed=4) + 0.3
    moment = inputs_of([inputs.flatten(0, 1)]).own[0]
    rows = rows_of(layer, norm)
    weights = query_energy(rows, moment).view(shape.kv_heads, shape.group, rows.planes).sum(1)
    return Case(
        layer, mixture(rows, moment, weights).of(rows), observed_of(layer, inputs, **options)
    )


def _smaller(layer: AttentionLayer) -> AttentionLayer:
    """Scores of order one, else attention is all but certain."""
    assert layer.q is not None
    return dataclasses.replace(layer, q=0.3 * layer.q)


def _looped(
    case: Case, *, by_output: bool, turning: Tensor, chosen: list[int] | None = None
) -> Attended:
    """The definitions, token by token."""
    layer, found, scale = case.layer, case.mixed, case.observed.scoring.scale
    heads, group, width = layer.geometry.heads, layer.geometry.group, layer.geometry.head_dim
    planes, count = found.energy.shape
    assert layer.o is not None
    energy = torch.zeros(heads, planes, count, dtype=torch.float64)
    turned = torch.zeros(heads, planes, count, dtype=torch.complex128)
    queries = torch.zeros(heads, width, width, dtype=torch.float64)
    together = torch.zeros(heads, heads, dtype=torch.float64)
    order = [dim for pair in pairs_of(layer) for dim in pair]
    order += range(2 * planes, width)
    looked = range(T) if chosen is None else chosen
    for inputs in case.observed.inputs:
        norm = case.observed.scoring.norm
        mixing = causal_weights(original_scores(layer, inputs, turning, scale, norm))
        query = normed(heads_of(layer, "q", inputs), norm, layer.q_norm)
        value = heads_of(layer, "v", inputs)
        factors = torch.ones(T, layer.geometry.kv_heads)
        factors = factors if norm is None else key_factors_of(layer, norm, inputs)
        parts = torch.einsum("pne,te->tpn", found.rows, augmented(inputs) + 0j)
        for h in range(heads):
            output = layer.o[:, h]
            for t in looked:
                given = sum(mixing[h, t, s] * value[s, h // group] for s in range(T))
                for s in range(t + 1):
                    share = mixing[h, t, s]
                    if by_output:
                        moved = output @ (value[s, h // group] - given)
                        share = share**2 * moved.square().sum()
                    share = share * factors[s, h // group] ** 2
                    ordered = query[t, h, order]
                    queries[h] += share * torch.outer(ordered, ordered)
                    for p in range(planes):
                        size = ordered[2 * p] ** 2 + ordered[2 * p + 1] ** 2
                        turn = cmath.exp(1j * (s - t) * float(turning[p]))
                        for j in range(count):
                            part = found.maps[h // group, p, j] * parts[s, p, j]
                            read = share * size * part.abs().square()
                            energy[h, p, j] += read
                            turned[h, p, j] += read * turn
        for h in range(heads):
            for g in range(heads):
                together[h, g] += sum(float(mixing[h, t] @ mixing[g, t]) for t in looked)
    seen = N * len(looked)
    return Attended(energy / seen, turned / energy, queries / seen, together / seen)


def _assert_same(found: Attended, expected: Attended) -> None:
    for field in dataclasses.fields(Attended):
        ours, wanted = getattr(found, field.name), getattr(expected, field.name)
        if wanted.is_complex():
            ours, wanted = torch.view_as_real(ours), torch.view_as_real(wanted)
        assert ours.shape == wanted.shape
        if wanted.numel():
            assert_close(ours, wanted, atol=1e-10 * max(1.0, float(wanted.abs().max())))


@shapes
@pytest.mark.parametrize("by_output", [True, False], ids=["output", "weights"])
def test_moments_are_sums_over_queries_keys_and_heads(shape: Shape, by_output: bool) -> None:
    case = _case(shape)
    turning = frequencies(shape.rope_dim // 2)
    found = attended(case.observed, case.mixed, by_output=by_output)
    _assert_same(found, _looped(case, by_output=by_output, turning=turning))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [SHAPES["GQA"], SHAPES["MHA"]], ids=["GQA", "MHA"])
def test_norms_of_queries_and_keys_count(shape: Shape, norm: QkNorm) -> None:
    case = _case(shape, norm=norm, norm_eps=EPS)
    turning = frequencies(shape.rope_dim // 2)
    found = attended(case.observed, case.mixed)
    _assert_same(found, _looped(case, by_output=True, turning=turning))


@shapes
def test_of_long_windows_some_queries_are_looked_at(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", 3)
    case = _case(shape)
    turning = frequencies(shape.rope_dim // 2)
    found = attended(case.observed, case.mixed)
    _assert_same(found, _looped(case, by_output=True, turning=turning, chosen=[0, 2, 5]))


def test_single_precision_is_enough_to_measure() -> None:
    """Layers are calibrated in it; four digits are far beyond what a text can tell."""
    case = _case(SHAPES["GQA"])
    expected = attended(case.observed, case.mixed)
    layer = {
        name: getattr(case.observed.layer, name).float()
        for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")
    }
    observed = dataclasses.replace(
        case.observed,
        layer=dataclasses.replace(case.observed.layer, **layer),
        inputs=case.observed.inputs.float(),
        scoring=dataclasses.replace(
            case.observed.scoring, turn=case.observed.scoring.turn.to(torch.complex64)
        ),
    )
    found = attended(observed, case.mixed)
    for name in ("energy", "queries", "values"):
        wanted = getattr(expected, name)
        assert_close(getattr(found, name), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert float((found.turn - expected.turn).abs().max()) < 1e-4


@rotary
def test_constants_are_never_longer_than_the_turn(shape: Shape) -> None:
    for by_output in (True, False):
        case = _case(shape)
        found = attended(case.observed, case.mixed, by_output=by_output)
        assert float(found.turn.abs().max()) <= 1 + 1e-12
        lost = lost_without_turn(found)
        assert bool((lost <= found.energy.sum(0) * (1 + 1e-12)).all())
        assert bool((lost > 0).all())


@rotary
def test_the_factor_of_a_scaled_rotation_is_no_part_of_the_turn(shape: Shape) -> None:
    """Constants take the place of the turn; the factor is put on them where keys are made."""
    case = _case(shape)
    scoring = case.observed.scoring
    longer = dataclasses.replace(
        case.observed,
        scoring=dataclasses.replace(scoring, turn=1.5 * scoring.turn, scale=scoring.scale / 1.5**2),
    )
    rest = case.layer.geometry.head_dim - shape.rope_dim
    if rest:  # dims that do not turn have no factor
        still = torch.ones(shape.head_dim, 1, dtype=torch.float64)
        still[shape.rope_dim :] = 1.5
        fields = {
            name: getattr(case.observed.layer, name)
            * (still if name in {"q", "k"} else still[:, 0])
            for name in ("q", "k", "q_bias", "k_bias")
            if getattr(case.observed.layer, name) is not None
        }
        longer = dataclasses.replace(longer, layer=dataclasses.replace(longer.layer, **fields))
    found, expected = attended(longer, case.mixed), attended(case.observed, case.mixed)
    assert float((found.turn - expected.turn).abs().max()) < 1e-12
    assert_close(found.energy, expected.energy, atol=1e-10 * float(expected.energy.max()))


@rotary
def test_planes_that_do_not_turn_lose_nothing(shape: Shape) -> None:
    case = _case(shape)
    turn = case.observed.scoring.turn.clone()
    turn[:, 1] = 1
    scoring = dataclasses.replace(case.observed.scoring, turn=turn)
    observed = dataclasses.replace(case.observed, scoring=scoring)
    found = attended(observed, case.mixed)
    turning = frequencies(shape.rope_dim // 2).clone()
    turning[1] = 0
    _assert_same(found, _looped(case, by_output=True, turning=turning))
    assert float((found.turn[:, 1] - 1).abs().max()) < 1e-12
    lost = lost_without_turn(found)
    assert float(lost[1].max()) < 1e-12 * float(found.energy.sum())
    assert float(lost[0].min()) > 1e-6 * float(lost[0].max()) > 0


@rotary
def test_without_text_inputs_are_white_and_attention_falls_with_distance(shape: Shape) -> None:
    layer, context = random_layer(shape, seed=2), 9
    assert layer.q is not None
    assert layer.k is not None
    assert layer.v is not None
    assert layer.o is not None
    heads, group, planes = layer.geometry.heads, layer.geometry.group, shape.rope_dim // 2
    rows, turning = rows_of(layer), frequencies(planes)
    moment = torch.eye(shape.hidden + 1, dtype=torch.float64)
    weights = query_energy(rows, moment)
    components = mixture(rows, moment, weights.view(shape.kv_heads, group, planes).sum(1)).of(rows)
    found = presumed(layer, rows, components, weights, turning, context=context)

    whole = sum(1 / (1 + d) for d in range(context))
    full = {
        part: torch.cat([getattr(layer, part), _bias(layer, part)[..., None]], -1) for part in "qkv"
    }
    order = [dim for pair in pairs_of(layer) for dim in pair]
    order += range(shape.rope_dim, shape.head_dim)
    keys = outputs = 0.0
    for h in range(heads):
        query, key, value = full["q"][h], full["k"][h // group], full["v"][h // group]
        keys += float((query.T @ key).square().sum())  # of q . k with independent inputs
        outputs += float((layer.o[:, h] @ value).square().sum())
        metric = query[order] @ query[order].T
        assert_close(found.queries[h], metric, atol=1e-10 * float(metric.max()))
        for p, pair in enumerate(pairs_of(layer)):
            turn = sum(
                cmath.exp(-1j * d * float(turning[p])) / (1 + d) / whole for d in range(context)
            )
            power = query[list(pair)].square().sum()
            for j in range(shape.kv_heads):
                expected = power * components.maps[h // group, p, j].abs().square()
                assert abs(complex(found.turn[h, p, j]) - turn) < 1e-12
                assert_close(found.energy[h, p, j], expected, atol=1e-10 * float(expected + 1))
    balance = keys / outputs * torch.eye(heads, dtype=torch.float64)
    assert_close(found.values, balance, atol=1e-10 * float(balance.max()))


def _bias(layer: AttentionLayer, part: str) -> Tensor:
    bias: Tensor | None = getattr(layer, f"{part}_bias")
    return getattr(layer, part)[..., 0] * 0 if bias is None else bias

"""Layers that share one latent, against what each of them does with its own input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attended import Attended, attended
from convert.methods.joint import (
    Joint,
    complete,
    factored_jointly,
    joint,
    lost_in_latent,
    lost_with_turn,
    parts_of,
    reader,
    stacked,
    together,
    unpredicted,
)
from convert.methods.latent import Factored, latent_form, still_keys, value_gram
from convert.methods.merge import Inputs
from tests.helpers import assert_close
from tests.methods.layers import Shape, augmented, correlated, inputs_of, randn, random_layer
from tests.methods.references import (
    NORMS,
    causal_weights,
    frequencies,
    heads_of,
    latent_outcome,
    normed,
    observed_of,
    original_outcome,
    original_scores,
    positive,
    with_norms,
)

T, SAMPLES, SCALES = 8, 60, (0.37, 0.21, 0.3)
ALL = ("q", "k", "v", "o")
SHAPES = {
    "MHA": Shape(kv_heads=3, group=1),
    "GQA biases": Shape(kv_heads=2, group=2, biases=ALL),
    "MQA interleaved": Shape(kv_heads=1, group=3, biases=("v",), interleaved=True, rope_dim=6),
    "NoPE": Shape(kv_heads=2, group=1, biases=("k",), rope_dim=0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
counts = pytest.mark.parametrize("count", [1, 2, 3])


@dataclass(frozen=True, slots=True)
class Case:
    """A unit of layers, their inputs [samples, E], and made-up facts about their attention."""

    samples: list[Tensor]
    inputs: Inputs | None
    unit: Joint
    attended: Attended


def _layers(shape: Shape, count: int) -> list[AttentionLayer]:
    layers = [random_layer(shape, seed=2 + n) for n in range(count)]
    return [dataclasses.replace(layer, q=0.3 * layer.q) for layer in layers]  # type: ignore[operator]


def _case(shape: Shape, samples: list[Tensor], *, equal: bool = False) -> Case:
    count = len(samples)
    inputs = None if equal else inputs_of(samples)
    unit = joint(_layers(shape, count), inputs, [1.0, 0.4, 2.0][:count])
    planes, heads = shape.rope_dim // 2, shape.kv_heads * shape.group
    components = count * shape.kv_heads
    parts = [
        Attended(
            energy=randn(heads, planes, components, seed=place).square(),
            turn=0.5
            * torch.complex(*randn(2, heads, planes, components, seed=20 + place).clamp(-1, 1)),
            queries=torch.stack([positive(shape.head_dim, 30 * place + h) for h in range(heads)]),
            values=positive(heads, 90 + place),
        )
        for place in range(count)
    ]
    seen = together(parts, SCALES[:count], [1.0, 0.7, 0.2][:count])
    return Case(samples, inputs, unit, seen)


def _linear(count: int, hidden: int) -> list[Tensor]:
    """Inputs that are affine in that of the first layer."""
    first = randn(SAMPLES, hidden, seed=1)
    others = [
        first @ (torch.eye(hidden).double() + 0.3 * randn(hidden, hidden, seed=n))
        + randn(hidden, seed=60 + n)
        for n in range(1, count)
    ]
    return [first, *others]


def _factored(case: Case, keys: Tensor, rank: int) -> Factored:
    return factored_jointly(case.unit, case.attended, keys, rank, centred=True)


def _converted(case: Case, kept: Tensor, rank: int) -> list[LatentLayer]:
    unit = case.unit
    keys = still_keys(unit.rows, unit.mixed, case.attended.turn, kept, 1.0)
    parts = parts_of(_factored(case, keys, rank), len(unit.layers))
    return [
        latent_form(
            unit.member(place),
            unit.rows_of(place),
            unit.mixed_for(place),
            kept=kept,
            factored=part,
            scale=SCALES[place],
        )
        for place, part in enumerate(parts)
    ]


def _all(case: Case, value: bool) -> Tensor:
    return torch.full(case.unit.mixed.energy.shape, value)


@shapes
@counts
def test_what_is_linear_in_one_input_is_shared_without_loss(shape: Shape, count: int) -> None:
    """With all components rotary and a latent of the width of the input."""
    case = _case(shape, _linear(count, shape.hidden))
    layers, speeds = (
        _converted(case, _all(case, True), shape.hidden),
        frequencies(shape.rope_dim // 2),
    )
    read = case.samples[0][:T]
    for place, layer in enumerate(layers):
        own = case.samples[place][:T]
        wanted = original_outcome(case.unit.layers[place], own, speeds, SCALES[place])
        # the ridge of the predictions is a millionth of the inputs' power
        atol = (1e-4 if place else 1e-10) * float(wanted.abs().max())
        assert_close(latent_outcome(layer, own, speeds, read=read), wanted, atol=atol)
        assert layer.geometry.rope_dim == count * shape.kv_heads * shape.rope_dim
    assert unpredicted(case.unit, case.attended, case.inputs) == pytest.approx(
        [0] * count, abs=1e-6
    )


@shapes
def test_equal_inputs_need_no_text(shape: Shape) -> None:
    case = _case(shape, [randn(T, shape.hidden, seed=1)] * 3, equal=True)
    speeds = frequencies(shape.rope_dim // 2)
    for place, layer in enumerate(_converted(case, _all(case, True), shape.hidden)):
        wanted = original_outcome(case.unit.layers[place], case.samples[0], speeds, SCALES[place])
        atol = 1e-10 * float(wanted.abs().max())
        assert_close(latent_outcome(layer, case.samples[0], speeds), wanted, atol=atol)
    assert unpredicted(case.unit, case.attended, None) == [0, 0, 0]


@pytest.mark.parametrize("rank", [2, 4])
@shapes
@counts
def test_predicted_losses_are_those_of_the_samples(shape: Shape, count: int, rank: int) -> None:
    """Of keys without rotation and of values: what the latent leaves out and no input gives."""
    case = _case(shape, correlated(count, SAMPLES, shape.hidden, seed=4))
    heads, kv_heads = shape.kv_heads * shape.group, shape.kv_heads
    unit, still = case.unit, torch.ones_like(case.attended.turn)
    keys = still_keys(unit.rows, unit.mixed, still, _all(case, False), 1.0)
    factors = _factored(case, keys, rank)
    left = lost_in_latent(unit, case.attended, keys, factors, centred=True)
    missing = unpredicted(unit, case.attended, case.inputs)
    gram = value_gram(unit.layer, case.attended.values)
    latents = case.samples[0] @ factors.latent.T
    width = kv_heads * shape.value_dim
    for place, part in enumerate(parts_of(factors, count)):
        metric = case.attended.queries[place * heads : (place + 1) * heads]
        block = gram[place * width : (place + 1) * width, place * width : (place + 1) * width]

        def energy(keys: Tensor, values: Tensor, metric=metric, block=block) -> float:  # type: ignore[no-untyped-def]
            keys, values = keys - keys.mean(0), (values - values.mean(0)).flatten(1)
            found = torch.einsum("thd,hdf,thf->", keys, metric, keys)
            return float(found + torch.einsum("ta,ab,tb->", values, block, values)) / SAMPLES

        own = joint([unit.layers[place]], None, [1.0]).rows  # what it reads of its own input
        mine = augmented(case.samples[place])
        each = own.k.repeat_interleave(shape.group, 0)
        true = torch.einsum("hde,te->thd", each, mine), torch.einsum("hde,te->thd", own.v, mine)
        read = augmented(case.samples[0])
        rows = keys[place * heads : (place + 1) * heads], unit.rows_of(place).v
        given = tuple(torch.einsum("hde,te->thd", row, read) for row in rows)
        held = tuple(torch.einsum("hdr,tr->thd", up, latents) for up in (part.k_up, part.v_up))
        lost = energy(given[0] - held[0], given[1] - held[1])
        assert left[place] == pytest.approx(lost / energy(*given), rel=1e-6)
        lost = energy(true[0] - given[0], true[1] - given[1])
        assert missing[place] == pytest.approx(lost / energy(*true), rel=1e-6, abs=1e-12)
        if place:
            assert missing[place] > 0.01


@shapes
@counts
def test_what_turns_in_vain_is_told_layer_by_layer(shape: Shape, count: int) -> None:
    case = _case(shape, correlated(count, SAMPLES, shape.hidden, seed=4))
    kept = torch.arange(case.unit.mixed.energy.numel()).view(case.unit.mixed.energy.shape) % 3 == 0
    found = lost_with_turn(case.attended, kept, count)
    heads = shape.kv_heads * shape.group
    for place in range(count):
        total = lost = 0.0
        for head in range(place * heads, (place + 1) * heads):
            for plane, component in product(*map(range, kept.shape)):
                energy = float(case.attended.energy[head, plane, component])
                turn = complex(case.attended.turn[head, plane, component])
                total += energy
                lost += 0.0 if kept[plane, component] else energy * max(0, 1 - abs(turn) ** 2)
        assert found[place] == pytest.approx(lost / total if total else 0.0)


def test_a_unit_of_one_is_the_layer() -> None:
    (layer,) = _layers(SHAPES["GQA biases"], 1)
    assert stacked([layer], None) is layer
    unit = joint([layer], None, [1.0])
    assert unit.member(0) is layer
    part = Attended(*(randn(2, 2, seed=n) for n in range(4)))
    found = together([part], [1.0], [1.0])
    assert all(getattr(found, n).equal(getattr(part, n)) for n in ("energy", "queries", "values"))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_components_of_normed_keys_count_as_their_norm_lets_them(norm: QkNorm) -> None:
    """For one token the norms are known; all components of a plane carry what its heads do."""
    shape = Shape(kv_heads=2, group=2, interleaved=True)
    layer = with_norms(random_layer(shape, seed=3), norm, seed=6)
    assert layer.q is not None
    assert layer.k is not None
    layer = dataclasses.replace(layer, q=1e6 * layer.q, k=1e6 * layer.k)  # epsilon is nothing
    token = randn(1, shape.hidden, seed=4)
    unit = joint([layer], inputs_of([token]), [1.0], norm)
    query, key = (
        normed(heads_of(layer, part, token), norm, getattr(layer, f"{part}_norm"))[0]
        for part in ("q", "k")
    )
    power = [
        heads[:, : shape.rope_dim].unflatten(1, (-1, 2)).square().sum(-1)
        for heads in (query, key.repeat_interleave(shape.group, 0))
    ]
    expected = (power[0] * power[1]).sum(0)
    assert_close(unit.mixed.energy.sum(-1), expected, atol=1e-8 * float(expected.max()))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_the_latent_of_normed_keys_leaves_out(norm: QkNorm, centred: bool) -> None:
    """Constants among it, whether or not the result can hold them elsewhere."""
    shape, rank = SHAPES["GQA biases"], 4
    layer = with_norms(random_layer(shape, seed=3), norm, seed=6)
    samples = randn(SAMPLES, shape.hidden, seed=4) + 0.5
    unit = joint([layer], inputs_of([samples]), [1.0], norm)
    seen = _case(shape, [samples]).attended
    still = torch.ones_like(seen.turn)
    keys = still_keys(unit.rows, unit.mixed, still, torch.zeros(still.shape[1:]).bool(), 1.0)
    factors = factored_jointly(unit, seen, keys, rank, centred=centred)
    (found,) = lost_in_latent(unit, seen, keys, factors, centred=centred)
    gram, read = value_gram(layer, seen.values), augmented(samples)

    def energy(keys: Tensor, values: Tensor) -> float:
        flat = values.flatten(1)
        whole = torch.einsum("thd,hdf,thf->", keys, seen.queries, keys)
        return float(whole + torch.einsum("ta,ab,tb->", flat, gram, flat))

    latents = read @ factors.latent.T
    given = [torch.einsum("hde,te->thd", rows, read) for rows in (keys, unit.rows.v)]
    held = [torch.einsum("hdr,tr->thd", up, latents) for up in (factors.k_up, factors.v_up)]
    lost = energy(given[0] - held[0], given[1] - held[1])
    assert found == pytest.approx(lost / energy(*given), rel=1e-6)
    assert 0.01 < found < 0.99


def test_attention_of_a_reader_is_measured_on_the_keys_that_it_will_read() -> None:
    """Queries and weights of its own, components of the producer's input."""
    shape = SHAPES["GQA biases"]
    layers = _layers(shape, 2)
    windows = [randn(3, T, shape.hidden, seed=n) for n in (1, 2)]
    unit = joint(layers, inputs_of([w.flatten(0, 1) for w in windows]), [1.0, 1.0])
    mixed = unit.mixed_for(1)
    found = attended(observed_of(layers[1], windows[1]), mixed, read=windows[0], by_output=False)
    energy = torch.zeros_like(found.energy)
    for own, read in zip(windows[1], windows[0], strict=True):
        shares = causal_weights(original_scores(layers[1], own, frequencies(2), 0.37))
        query = torch.einsum("hpe,te->thp", unit.rows_of(1).turning_q, augmented(own) + 0j)
        parts = torch.einsum("pne,te->tpn", unit.mixed.rows, augmented(read) + 0j)
        power = torch.einsum("hts,thp,spn->hpn", shares, query.abs() ** 2, parts.abs() ** 2)
        energy += power / (3 * T)
    scale = mixed.maps.abs().square().repeat_interleave(shape.group, 0)
    assert_close(found.energy, scale * energy, atol=1e-9 * float(energy.max()))


def test_readers_store_nothing_and_get_it_back() -> None:
    case = _case(SHAPES["GQA biases"], _linear(2, 7))
    first, second = _converted(case, _all(case, True), 5)
    bare = reader(second)
    assert (len(bare.latent), len(bare.k_rope), bare.k_rope_bias) == (0, 0, None)
    back = complete(bare, first)
    for name in ("latent", "k_rope", "k_rope_bias"):
        assert getattr(back, name) is getattr(first, name)
        assert getattr(second, name).equal(getattr(first, name))


def test_errors_of_a_unit_are_in_one_unit() -> None:
    """An error of a score is one of its factor times that of the product; outputs add up apart."""
    parts = [
        Attended(*(randn(2, 2, 2, seed=4 * n + m) for m in range(3)), positive(2, n))
        for n in (1, 2)
    ]
    found = together(parts, [3.0, 0.5], [1.0, 7.0])
    for name in ("energy", "queries"):
        first, second = (getattr(part, name) for part in parts)
        assert_close(getattr(found, name), torch.cat([9 * first, 7 * 0.25 * second]), atol=1e-12)
    assert_close(found.values[:2, :2], parts[0].values, atol=1e-12)
    assert_close(found.values[2:, 2:], 7 * parts[1].values, atol=1e-12)
    assert not found.values[:2, 2:].any()

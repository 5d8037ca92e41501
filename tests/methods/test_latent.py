"""The latent form of a layer: what is exact, and that no other latent loses less."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer
from convert.methods.latent import (
    Factored,
    embedded,
    factored,
    latent_form,
    still_keys,
    value_gram,
    with_idle_pairs,
)
from convert.methods.mixing import Mixed, Rows, mixture, query_energy, rows_of
from tests.helpers import assert_close, assert_equal
from tests.methods.layers import (
    Shape,
    augmented,
    causal,
    correlated,
    inputs_of,
    randn,
    random_layer,
)
from tests.methods.references import (
    causal_weights,
    frequencies,
    heads_of,
    latent_outcome,
    latent_scores,
    original_outcome,
    original_scores,
    outcome_of,
    pairs_of,
    positive,
)

T, SAMPLES, SCALE = 8, 40, 0.37
ALL = ("q", "k", "v", "o")
SHAPES = {
    "MHA": Shape(kv_heads=4, group=1),
    "MHA biases": Shape(kv_heads=4, group=1, biases=ALL, rope_dim=6),
    "GQA": Shape(kv_heads=2, group=2, biases=("q", "k", "v")),
    "GQA interleaved": Shape(kv_heads=2, group=2, biases=("v",), interleaved=True),
    "MQA": Shape(kv_heads=1, group=4, biases=("k", "o"), rope_dim=6, interleaved=True),
    "NoPE": Shape(kv_heads=2, group=2, biases=ALL, rope_dim=0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True, slots=True)
class Case:
    """A layer, its keys as components, and one window of inputs."""

    layer: AttentionLayer
    rows: Rows
    mixed: Mixed
    moment: Tensor
    inputs: Tensor
    turn: Tensor


def _case(shape: Shape, seed: int = 2) -> Case:
    layer = random_layer(shape, seed=seed)
    assert layer.q is not None
    layer = dataclasses.replace(layer, q=0.3 * layer.q)  # no attention that is all but certain
    inputs = correlated(1, SAMPLES, shape.hidden, seed=seed + 1)[0]
    moment = inputs_of([inputs]).own[0]
    rows = rows_of(layer)
    weights = query_energy(rows, moment).reshape(shape.kv_heads, shape.group, rows.planes).sum(1)
    heads = layer.geometry.heads
    real, imaginary = 0.5 * randn(2, heads, rows.planes, shape.kv_heads, seed=seed + 2)
    found = mixture(rows, moment, weights).of(rows)
    return Case(layer, rows, found, moment, inputs[:T], torch.complex(real, imaginary))


def _factored(case: Case, keys: Tensor, rank: int, *, centred: bool = True) -> Factored:
    geometry = case.layer.geometry
    metric = torch.stack([positive(geometry.head_dim, h) for h in range(geometry.heads)])
    together = positive(geometry.heads, 50)
    return factored(
        keys,
        case.rows.v,
        key_metric=metric,
        value_gram=value_gram(case.layer, together),
        moment=case.moment,
        rank=rank,
        centred=centred,
    )


def _latent(
    case: Case, kept: Tensor, rank: int, *, factor: float = 1.0, centred: bool = True
) -> LatentLayer:
    keys = still_keys(case.rows, case.mixed, case.turn, kept, factor)
    factors = _factored(case, keys, rank, centred=centred)
    return latent_form(case.layer, case.rows, case.mixed, kept=kept, factored=factors, scale=SCALE)


def _kept(case: Case, choice: str) -> Tensor:
    """[P, n]: all components, some, or none."""
    shape = case.mixed.energy.shape
    if choice == "some":
        return (torch.arange(shape.numel()).view(shape) * 5) % 3 == 0
    return torch.full(shape, choice == "all")


def _partial_scores(case: Case, kept: Tensor, factor: float) -> Tensor:
    """[H, T, T] where only the components kept turn; a constant takes the turn of the others."""
    layer, inputs, group = case.layer, case.inputs, case.layer.geometry.group
    speeds = frequencies(case.rows.planes)
    query, key = heads_of(layer, "q", inputs), heads_of(layer, "k", inputs)
    parts = torch.einsum("pne,te->tpn", case.mixed.rows, augmented(inputs) + 0j)
    rest = slice(2 * case.rows.planes, None)
    scores = torch.einsum(
        "thd,shd->hts", query[..., rest], key.repeat_interleave(group, 1)[..., rest]
    )
    place = torch.arange(len(inputs))
    distance = (place - place[:, None]).double()  # of key s from query t
    for head in range(layer.geometry.heads):
        for plane, (i, j) in enumerate(pairs_of(layer)):
            asked = torch.complex(query[:, head, i], query[:, head, j]).conj()
            for component in range(kept.shape[1]):
                read = case.mixed.maps[head // group, plane, component] * parts[:, plane, component]
                angle = distance * speeds[plane]
                turn = torch.complex(angle.cos(), angle.sin())
                if not kept[plane, component]:
                    turn = case.turn[head, plane, component].expand_as(turn)
                scores[head] += (asked[:, None] * turn * factor * read).real
    return SCALE * scores


@shapes
def test_embedding_is_the_same_function(shape: Shape) -> None:
    case = _case(shape)
    found = embedded(case.layer, SCALE)
    sizes, speeds = found.geometry, frequencies(shape.rope_dim // 2)
    still = shape.head_dim - shape.rope_dim
    assert sizes.rank == shape.kv_heads * (still + shape.value_dim)
    assert sizes.rope_dim == shape.kv_heads * shape.rope_dim
    expected = original_outcome(case.layer, case.inputs, speeds, SCALE)
    atol = 1e-10 * float(expected.abs().max())
    assert_close(latent_outcome(found, case.inputs, speeds), expected, atol=atol)


@shapes
@pytest.mark.parametrize("centred", [True, False])
def test_with_all_that_turns_and_full_rank_nothing_is_lost(shape: Shape, centred: bool) -> None:
    case = _case(shape)
    kept = _kept(case, "all")
    found = _latent(case, kept, shape.hidden, centred=centred)
    speeds = frequencies(case.rows.planes)
    expected = original_outcome(case.layer, case.inputs, speeds, SCALE)
    atol = 1e-10 * float(expected.abs().max())
    assert_close(latent_outcome(found, case.inputs, speeds), expected, atol=atol)
    assert found.geometry.rope_dim == shape.kv_heads * shape.rope_dim
    assert len(found.planes) == shape.kv_heads * shape.rope_dim // 2


@pytest.mark.parametrize("biases", [(), ("q", "k"), ("v",), ("o",)])
@pytest.mark.parametrize("centred", [True, False])
def test_the_output_has_a_bias_only_if_something_is_in_it(
    biases: tuple[str, ...], centred: bool
) -> None:
    """Files that servers load have no place for one, and a bias of zeros would be refitted."""
    case = _case(Shape(kv_heads=2, group=2, biases=biases))
    kept = _kept(case, "some")
    found = _latent(case, kept, 4, centred=centred)
    assert (found.o_bias is None) == (not centred and not {"v", "o"} & set(biases))


@shapes
def test_any_invertible_mixing_of_the_heads_will_do(shape: Shape) -> None:
    case, count = _case(shape), shape.kv_heads
    real, imaginary = randn(2, case.rows.planes, count, count, seed=9)
    mixing = torch.complex(real, imaginary)
    mixed = Mixed(
        rows=torch.einsum("pjg,gpe->pje", mixing, case.rows.turning_k),
        maps=torch.linalg.inv(mixing).transpose(0, 1),
        energy=case.mixed.energy,
    )
    kept = _kept(case, "all")
    found = _latent(dataclasses.replace(case, mixed=mixed), kept, shape.hidden)
    speeds = frequencies(case.rows.planes)
    expected = original_outcome(case.layer, case.inputs, speeds, SCALE)
    atol = 1e-9 * float(expected.abs().max())
    assert_close(latent_outcome(found, case.inputs, speeds), expected, atol=atol)


@shapes
@pytest.mark.parametrize("choice", ["some", "none"])
@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("centred", [True, False])
def test_after_a_cut_constants_take_the_place_of_the_turn(
    shape: Shape, choice: str, factor: float, centred: bool
) -> None:
    """Constants of keys shift all scores of a query alike, so attention is compared."""
    case = _case(shape)
    kept = _kept(case, choice)
    found = _latent(case, kept, shape.hidden, factor=factor, centred=centred)
    speeds = frequencies(case.rows.planes)
    # the factor of the rotation is no part of the rotary key: who runs it puts it on its tables
    rooted = dataclasses.replace(found, k_rope=factor * found.k_rope)
    if found.k_rope_bias is not None:
        rooted = dataclasses.replace(rooted, k_rope_bias=factor * found.k_rope_bias)
    scores = _partial_scores(case, kept, factor)
    weights = causal_weights(latent_scores(rooted, case.inputs, speeds))
    assert_close(weights, causal_weights(scores), atol=1e-10)
    expected = outcome_of(case.layer, scores, case.inputs)
    atol = 1e-10 * float(expected.abs().max())
    assert_close(latent_outcome(rooted, case.inputs, speeds), expected, atol=atol)
    assert found.planes == tuple(p for p, row in enumerate(kept.tolist()) for k in row if k)


@shapes
def test_full_rank_gives_back_keys_and_values(shape: Shape) -> None:
    """On inputs unlike those that were measured, of which there may be few.

    Constants of keys are left out; those of values are all there.
    """
    case = _case(shape)
    keys = randn(shape.kv_heads * shape.group, shape.head_dim, shape.hidden + 1, seed=5)
    other = randn(20, shape.hidden, seed=6)
    few = dataclasses.replace(case, moment=inputs_of([case.inputs[:3]]).own[0])
    for seen, centred in product((case, few), (True, False)):
        found = _factored(seen, keys, shape.hidden, centred=centred)
        latents = other @ found.latent.T
        wanted = torch.einsum("hde,te->thd", keys[..., :-1], other)
        read = torch.einsum("hdr,tr->thd", found.k_up, latents)
        assert_close(read, wanted, atol=1e-10 * float(wanted.abs().max()))
        wanted = heads_of(case.layer, "v", other)
        read = torch.einsum("hdr,tr->thd", found.v_up, latents) + found.v_constant
        assert_close(read, wanted, atol=1e-10 * float(wanted.abs().max()))


@shapes
def test_keys_without_turn_are_those_of_the_layer_for_constants_of_one(shape: Shape) -> None:
    """NoPE: nothing kept, nothing turned."""
    case = _case(shape)
    kept = _kept(case, "none")
    keys = still_keys(case.rows, case.mixed, torch.ones_like(case.turn), kept, 1.0)
    read = torch.einsum("hde,te->htd", keys, augmented(case.inputs))
    query = torch.einsum("hde,te->htd", case.rows.q, augmented(case.inputs))
    expected = original_scores(
        case.layer, case.inputs, torch.zeros(case.rows.planes, dtype=torch.float64), 1.0
    )
    assert_close(query @ read.mT, expected, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("biases", [(), ("q",), ("k",), ALL])
def test_idle_pairs_change_nothing(biases: tuple[str, ...]) -> None:
    case = _case(Shape(kv_heads=2, group=2, rope_dim=0, biases=biases))
    still = _latent(case, _kept(case, "all"), 4)
    speeds, planes = frequencies(3), (2, 0, 2)
    for layer in (still, embedded(case.layer, SCALE)):
        found = with_idle_pairs(layer, planes)
        assert found.planes == planes
        assert found.geometry == dataclasses.replace(layer.geometry, rope_dim=6)
        for name in ("latent", "k_up", "v_up", "o"):
            assert_equal(getattr(found, name), getattr(layer, name))
        expected = latent_outcome(layer, case.inputs, speeds)
        assert_close(latent_outcome(found, case.inputs, speeds), expected, atol=1e-12)
        assert (found.q_bias is None) == (layer.q_bias is None)
        assert (found.k_rope_bias is None) == (layer.k_rope_bias is None)


def test_frequencies_are_those_of_the_scoring() -> None:
    """The two helpers that the tests of this folder measure positions with agree."""
    turn = causal(T, 3).turn
    expected = torch.outer(torch.arange(T).double(), frequencies(3))
    assert_close(torch.view_as_real(turn), torch.view_as_real(torch.exp(1j * expected)), atol=1e-12)

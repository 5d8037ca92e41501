"""The rewrites of a layer against plain torch: the same numbers, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convert.layer import AttentionLayer, Geometry
from convert.targets.carrier import rotating
from convert.targets.folds import (
    absorb_norm,
    absorb_norm_into_qkv,
    half_split_order,
    proportional_order,
    reorder_heads,
    with_all_biases,
)
from tests.helpers import assert_close, assert_equal

_GEOMETRY = Geometry(hidden=10, heads=4, kv_heads=2, head_dim=8, value_dim=6)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _layer(*, biases: bool) -> AttentionLayer:
    q, k, v = _random(4, 8, 10, seed=1), _random(2, 8, 10, seed=2), _random(2, 6, 10, seed=3)
    own = {"q_bias": _random(4, 8), "k_bias": _random(2, 8), "v_bias": _random(2, 6)}
    return AttentionLayer(
        geometry=_GEOMETRY, q=q, k=k, v=v, o=_random(10, 4, 6), **(own if biases else {})
    )


@pytest.mark.parametrize("rows", [7, 2050])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_absorbing_a_norm_leaves_the_map_of_norm_and_projection(
    rows: int, biased: bool, shifted: bool
) -> None:
    norm = nn.LayerNorm(10, dtype=torch.float64)
    linear = nn.Linear(10, rows, bias=biased, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(_random(10, seed=5))
        norm.bias.copy_(_random(10, seed=6) * shifted)
        weight, bias = absorb_norm(
            linear.weight,
            linear.bias if biased else None,
            norm.weight,
            norm.bias if shifted else None,
        )
        x = _random(3, 10)
        bare = nn.functional.layer_norm(x, (10,))
        assert_close(nn.functional.linear(bare, weight, bias), linear(norm(x)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_absorbing_a_norm_rounds_once(dtype: torch.dtype) -> None:
    weight, bias = _random(9, 64).to(dtype), _random(9).to(dtype)
    norm, shift = _random(64, seed=1).to(dtype), _random(64, seed=2).to(dtype)
    scaled, moved = absorb_norm(weight, bias, norm, shift)
    exact = weight.double() @ shift.double() + bias.double()
    assert_equal(scaled, (weight.double() * norm.double()).to(dtype))
    # the sum is made in the next wider dtype, so the last bit may fall either way
    error = (moved.double() - exact).abs()
    assert bool((error <= 0.5001 * torch.finfo(dtype).eps * exact.abs()).all())


def test_absorbing_a_norm_changes_no_input() -> None:
    layer, norm, shift = _layer(biases=True), _random(10, seed=1), _random(10, seed=2)
    before = [t.clone() for t in (layer.q, layer.q_bias, norm, shift) if t is not None]
    absorb_norm_into_qkv(layer, norm, shift)
    for tensor, copy in zip((layer.q, layer.q_bias, norm, shift), before, strict=True):
        assert tensor is not None
        assert_equal(tensor, copy)


@pytest.mark.parametrize("biases", [True, False])
def test_queries_keys_and_values_absorb_the_norm_before_them(biases: bool) -> None:
    layer, norm, shift = _layer(biases=biases), _random(10, seed=1), _random(10, seed=2)
    folded, x = absorb_norm_into_qkv(layer, norm, shift), _random(3, 10)
    for part in ("q", "k", "v"):
        old, new = getattr(layer, part), getattr(folded, part)
        old_bias, new_bias = getattr(layer, f"{part}_bias"), getattr(folded, f"{part}_bias")
        expected = torch.einsum("hde,te->thd", old, x * norm + shift)
        expected = expected if old_bias is None else expected + old_bias
        assert_close(torch.einsum("hde,te->thd", new, x) + new_bias, expected, atol=1e-12)
    assert folded.o is layer.o
    assert folded.o_bias is None


@pytest.mark.parametrize(("rotary", "dim"), [(2, 8), (4, 8), (8, 8), (6, 10)])
def test_orders_take_every_pair_to_its_new_place(rotary: int, dim: int) -> None:
    halves, proportional = half_split_order(rotary, dim), proportional_order(rotary, dim)
    for order in (halves, proportional):
        assert sorted(order.tolist()) == list(range(dim))
    for i in range(rotary // 2):
        assert (halves[i], halves[i + rotary // 2]) == (2 * i, 2 * i + 1)
        assert (proportional[i], proportional[i + dim // 2]) == (i, i + rotary // 2)
    assert halves[rotary:].tolist() == list(range(rotary, dim))


def test_reordering_moves_queries_and_keys_alike() -> None:
    layer, order = _layer(biases=True), torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    moved = reorder_heads(layer, order)
    for part in ("q", "k", "q_bias", "k_bias"):
        for new, old in enumerate(order.tolist()):
            assert_equal(getattr(moved, part)[:, new], getattr(layer, part)[:, old])
    assert moved.v is layer.v
    assert moved.o is layer.o


def test_missing_biases_become_zero_and_others_stay() -> None:
    filled = with_all_biases(_layer(biases=False))
    shapes = {"q_bias": (4, 8), "k_bias": (2, 8), "v_bias": (2, 6), "o_bias": (10,)}
    for name, shape in shapes.items():
        assert_equal(getattr(filled, name), torch.zeros(shape, dtype=torch.float64))
    biased = _layer(biases=True)
    assert with_all_biases(biased).q_bias is biased.q_bias


def test_the_share_that_rotates_gives_the_dims_back() -> None:
    pairs = [(part, whole) for whole in range(2, 258, 2) for part in range(2, whole + 1, 2)]
    assert any(int(whole * (part / whole)) != part for part, whole in pairs)  # what it mends
    for part, whole in pairs:
        assert int(whole * rotating(part, whole)) == part

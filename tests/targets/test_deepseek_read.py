"""DeepSeek's attention read back: the layer that was written, and norms that do almost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.layer import LatentGeometry, LatentLayer
from convert.targets.deepseek_layer import INPUT_NORM, Layout, written
from convert.targets.deepseek_read import (
    StockForm,
    norm_error,
    norm_inputs,
    read_stock,
    stock_shapes,
)
from convert.targets.latent import latent_shapes, pack_latent, unpack_latent
from tests.families.stock import Float64
from tests.helpers import assert_close, assert_equal

_GEOMETRY = LatentGeometry(hidden=18, heads=3, rank=7, nope_dim=5, rope_dim=4, value_dim=6)
_PLANES = (2, 0)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _layer(*, biased: bool) -> LatentLayer:
    g = _GEOMETRY
    width = g.nope_dim + g.rope_dim
    biases = {
        "q_bias": _random(g.heads, width, seed=6),
        "k_rope_bias": _random(g.rope_dim, seed=7),
        "o_bias": _random(g.hidden, seed=8),
    }
    return LatentLayer(
        geometry=g,
        q=_random(g.heads, width, g.hidden, seed=0),
        latent=_random(g.rank, g.hidden, seed=1),
        k_rope=_random(g.rope_dim, g.hidden, seed=2),
        k_up=_random(g.heads, g.nope_dim, g.rank, seed=3),
        v_up=_random(g.heads, g.value_dim, g.rank, seed=4),
        o=_random(g.hidden, g.heads, g.value_dim, seed=5),
        planes=_PLANES,
        scale=0.3,
        **(biases if biased else {}),
    )


def _form(*, biased: bool, query_latent: bool) -> StockForm:
    rank = _GEOMETRY.hidden + 1 if query_latent else None
    return StockForm(geometry=_GEOMETRY, biased=biased, query_rank=rank)


def _tensors(form: StockForm, *, seed: int) -> dict[str, Tensor]:
    shapes = {**stock_shapes(form), INPUT_NORM: (_GEOMETRY.hidden,)}
    return {n: _random(*shape, seed=seed + i) for i, (n, shape) in enumerate(shapes.items())}


def _assert_same(actual: LatentLayer, expected: LatentLayer) -> None:
    """Fail unless both are one function; the latent may have another scale."""
    for name in ("k_up", "v_up"):
        own, wanted = (getattr(layer, name) @ layer.latent for layer in (actual, expected))
        assert_close(own, wanted, atol=1e-13)
    for name in ("q", "k_rope", "o", "q_bias", "k_rope_bias", "o_bias"):
        own, wanted = (getattr(layer, name) for layer in (actual, expected))
        if wanted is None:
            assert own is None or not own.any()
        else:
            assert_close(own, wanted, atol=1e-13)
    for name in ("geometry", "planes", "scale"):
        assert getattr(actual, name) == getattr(expected, name)


@pytest.mark.parametrize("biased", [False, True])
def test_our_layout_is_read_back(biased: bool) -> None:
    layer = _layer(biased=biased)
    packed = pack_latent(layer, "a.")
    assert {n.removeprefix("a."): tuple(t.shape) for n, t in packed.items()} == latent_shapes(
        _GEOMETRY
    )
    _assert_same(unpack_latent(packed, _GEOMETRY, "a.", planes=_PLANES, scale=0.3), layer)


@pytest.mark.parametrize(
    ("inert", "biased"), [("constant", True), ("constant", False), ("epsilon", False)]
)
def test_a_written_layer_is_read_back(inert: Any, biased: bool) -> None:
    layer = _layer(biased=biased)
    layout = Layout(
        rank=_GEOMETRY.rank,
        planes=_PLANES,
        nope_dim=_GEOMETRY.nope_dim,
        inert=inert,
        query_latent=biased,
        dtype=torch.float64,
        largest=None,
        rotary=1.0,
        residual=1.0,
        norm_plus_one=False,
    )
    norm = 1 + 0.3 * _random(_GEOMETRY.hidden, seed=9)
    _, tensors = written(layer, {INPUT_NORM: norm}, layout=layout)
    form = _form(biased=inert == "constant", query_latent=biased)
    shapes = {**stock_shapes(form), INPUT_NORM: norm.shape}
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert norm_error({n: tensors[n] for n in norm_inputs(form)}, form) < 2**-54
    _assert_same(read_stock(tensors, form, planes=_PLANES, scale=0.3), layer)


def _stock_norm(side: str, tensors: Mapping[str, Tensor], states: Tensor, rank: int) -> Tensor:
    """What the stock class makes of states [..., E] with its down-projection and norm."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    down = "self_attn.kv_a_proj_with_mqa" if side == "kv" else "self_attn.q_a_proj"
    norm = DeepseekV3RMSNorm(rank).double()
    norm.weight.data = tensors[f"self_attn.{side}_a_layernorm.weight"]
    bias = tensors.get(f"{down}.bias")
    latents = states @ tensors[f"{down}.weight"][:rank].T
    with Float64(), torch.no_grad():
        out: Tensor = norm(latents if bias is None else latents + bias[:rank])
    return out


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_neglected_is_at_most_what_is_said(biased: bool, size: float) -> None:
    """Random weights, all of them small beside the constant or the epsilon, against the class."""
    form = _form(biased=biased, query_latent=False)
    tensors, rank = _tensors(form, seed=20), form.cached_rank
    down = tensors["self_attn.kv_a_proj_with_mqa.weight"]
    if biased:
        tensors["self_attn.kv_a_proj_with_mqa.bias"][rank - 1] = 30 / size
    else:
        down *= 1e-3 * size**0.5 / 30
    said = norm_error({n: tensors[n] for n in norm_inputs(form)}, form)
    assert 0.01 * size < said < 10 * size
    # directions, among them the one that the norm bends most, of the norm that an RMS norm gives
    worst = tensors["self_attn.kv_a_proj_with_mqa.bias"][:rank] @ down[:rank] if biased else None
    largest = torch.linalg.svd(down[:rank] * tensors[INPUT_NORM]).Vh[0]
    inputs = _random(200, _GEOMETRY.hidden, seed=60)
    extremes = [largest] if worst is None else [largest, worst * tensors[INPUT_NORM]]
    inputs = torch.cat([inputs, torch.stack(extremes)])
    inputs = inputs / inputs.norm(dim=1, keepdim=True) * _GEOMETRY.hidden**0.5
    inputs = torch.cat([inputs, -inputs]) * tensors[INPUT_NORM]
    straight = read_stock(tensors, form, planes=_PLANES, scale=1.0)
    found = _stock_norm("kv", tensors, inputs, rank)[:, : _GEOMETRY.rank]
    zero = _stock_norm("kv", tensors, torch.zeros_like(inputs[:1]), rank)[:, : _GEOMETRY.rank]
    expected = inputs @ straight.latent.T + zero
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) <= said * (1 + 10 * size)
    assert float(errors.max()) >= 0.2 * said


def test_constants_of_a_latent_move_where_they_belong() -> None:
    """Values of a constant latent against the stock class's own: they are those of the output."""
    form = _form(biased=True, query_latent=False)
    tensors, g = _tensors(form, seed=30), _GEOMETRY
    tensors["self_attn.kv_a_proj_with_mqa.weight"][: form.cached_rank] = 0
    layer = read_stock(tensors, form, planes=_PLANES, scale=1.0)
    latent = _stock_norm("kv", tensors, torch.zeros(1, g.hidden).double(), form.cached_rank)
    up = tensors["self_attn.kv_b_proj.weight"].view(g.heads, -1, form.cached_rank)
    values = torch.einsum("hvr,r->hv", up[:, g.nope_dim :], latent[0]).flatten()
    expected = tensors["self_attn.o_proj.weight"] @ values + tensors["self_attn.o_proj.bias"]
    assert layer.o_bias is not None
    assert_close(layer.o_bias, expected, atol=1e-12)
    assert_equal(layer.latent, torch.zeros(g.rank, g.hidden, dtype=torch.float64))

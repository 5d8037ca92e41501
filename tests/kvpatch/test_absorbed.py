"""Attention to latents against attention of many heads on the expanded keys and values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvpatch.models.absorbed_kvpatch import absorbed_attention, prefers_absorbed
from tests.helpers import assert_close

BATCH, HEADS, RANK, ROPE = 2, 3, 6, 4


def _inputs(tokens: int, keys: int, *, rope: int = ROPE, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "query_latent": random(BATCH, HEADS, tokens, RANK),
        "query_rope": random(BATCH, HEADS, tokens, rope),
        "latent": random(BATCH, 1, keys, RANK),
        "key_rope": random(BATCH, 1, keys, rope),
    }


def _one_by_one(
    inputs: dict[str, Tensor],
    hidden: Any,
    scaling: float,
    softcap: float | None,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every query and key by itself; ``hidden(b, h, t, k)`` says what a query does not see."""
    query = torch.cat((inputs["query_latent"], inputs["query_rope"]), -1)
    key = torch.cat((inputs["latent"], inputs["key_rope"]), -1)
    batch, heads, tokens, _ = query.shape
    keys = key.shape[2]
    output = torch.zeros_like(inputs["query_latent"])
    weights = torch.zeros(batch, heads, tokens, keys, dtype=query.dtype)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        terms = []
        for k in range(keys):
            score = float(query[b, h, t] @ key[b, 0, k]) * scaling
            if key_scale is not None:
                score *= float(key_scale[b, h * key_scale.shape[1] // heads, k])
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            terms.append(0.0 if hidden(b, h, t, k) else math.exp(score))
        for k in range(keys):
            weights[b, h, t, k] = terms[k] / sum(terms)
            output[b, h, t] += weights[b, h, t, k] * inputs["latent"][b, 0, k]
    return output, weights


@pytest.mark.parametrize(("tokens", "keys", "rope"), [(1, 7, ROPE), (3, 5, ROPE), (2, 5, 0)])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_it_is_attention_on_latents_and_rotary_keys(
    tokens: int, keys: int, rope: int, softcap: float | None
) -> None:
    inputs = _inputs(tokens, keys, rope=rope)
    found = absorbed_attention(**inputs, mask=None, scaling=0.6, softcap=softcap)
    for got, want in zip(found, _one_by_one(inputs, lambda *_: False, 0.6, softcap), strict=True):
        assert_close(got, want, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_keys_have_a_factor_for_each_group_of_heads(groups: int, softcap: float | None) -> None:
    inputs = _inputs(3, 5)
    doubled = {"query_latent", "query_rope"}  # two heads of three groups, or six of one
    inputs = {name: t.repeat(1, 1 + (name in doubled), 1, 1) for name, t in inputs.items()}
    scale = torch.rand(BATCH, groups, 5, generator=torch.Generator().manual_seed(5)).double() + 0.5
    found = absorbed_attention(**inputs, mask=None, scaling=0.6, softcap=softcap, key_scale=scale)
    wanted = _one_by_one(inputs, lambda *_: False, 0.6, softcap, scale)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, atol=1e-12)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_mask_hides_and_what_is_beyond_the_keys_is_cut_off(additive: bool, heads: int) -> None:
    tokens, keys = 3, 5
    inputs = _inputs(tokens, keys)
    seen = torch.rand(BATCH, heads, tokens, keys + 2, generator=torch.Generator().manual_seed(3))
    seen = seen > 0.4
    seen[..., 0] = True
    lowest = torch.finfo(torch.float64).min
    mask = torch.zeros(seen.shape).double().masked_fill(~seen, lowest) if additive else seen
    found = absorbed_attention(**inputs, mask=mask, scaling=0.6)
    wanted = _one_by_one(inputs, lambda b, h, t, k: not seen[b, min(h, heads - 1), t, k], 0.6, None)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, atol=1e-12)


def test_a_bias_on_the_scores_counts_and_gives_way_to_none() -> None:
    inputs = _inputs(2, 5)
    bias = torch.randn(1, HEADS, 2, 5, generator=torch.Generator().manual_seed(4)).double()
    _, weights = absorbed_attention(**inputs, mask=bias, scaling=0.6)
    _, plain = absorbed_attention(**inputs, mask=None, scaling=0.6)
    wanted = plain * bias.exp()
    assert_close(weights, wanted / wanted.sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bool", "lowest", "infinite"])
def test_who_sees_nothing_stays_finite(dtype: torch.dtype, kind: str) -> None:
    inputs = {name: value.to(dtype) * 9 for name, value in _inputs(2, 5).items()}
    lowest = {"lowest": torch.finfo(dtype).min, "infinite": -math.inf}
    mask = (
        torch.zeros(1, 1, 2, 5, dtype=torch.bool)
        if kind == "bool"
        else torch.full((1, 1, 2, 5), lowest[kind], dtype=dtype)
    )
    output, weights = absorbed_attention(**inputs, mask=mask, scaling=0.6)
    assert output.isfinite().all()
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_that_of_fused_attention(dtype: torch.dtype) -> None:
    """Two roundings of the scores, against none in the fused function: within twice its error."""
    inputs = {name: value.to(dtype) for name, value in _inputs(64, 512).items()}
    exact, _ = absorbed_attention(
        **{name: value.double() for name, value in inputs.items()}, mask=None, scaling=0.3
    )
    got, weights = absorbed_attention(**inputs, mask=None, scaling=0.3)
    assert got.dtype == weights.dtype == dtype
    fused = torch.nn.functional.scaled_dot_product_attention(
        torch.cat((inputs["query_latent"], inputs["query_rope"]), -1),
        torch.cat((inputs["latent"], inputs["key_rope"]), -1).expand(-1, HEADS, -1, -1),
        inputs["latent"].expand(-1, HEADS, -1, -1),
        scale=0.3,
    )
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (got, fused))
    assert error < 2 * allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_products_are_in_half_precision(dtype: torch.dtype) -> None:
    """With whole numbers they are exact: what is left is one rounding of the weights."""
    whole = {name: (4 * value).round().clamp(-4, 4) for name, value in _inputs(3, 9).items()}
    bias = torch.linspace(-2, 2, 9)
    how: dict[str, Any] = {"scaling": 1.0, "softcap": 20.0}
    _, exact = absorbed_attention(**whole, mask=bias.double(), **how)
    halves = {name: value.to(dtype) for name, value in whole.items()}
    _, weights = absorbed_attention(**halves, mask=bias, **how)
    rounding = (weights.double() - exact).abs() / exact.clamp(min=torch.finfo(dtype).tiny)
    assert float(rounding[exact > 1e-3].max()) < torch.finfo(dtype).eps


def test_dropped_weights_leave_the_mean_as_it_is() -> None:
    inputs = _inputs(1, 6)
    torch.manual_seed(0)
    draws = [absorbed_attention(**inputs, mask=None, scaling=0.6, dropout=0.5) for _ in range(3000)]
    exact, weights = absorbed_attention(**inputs, mask=None, scaling=0.6)
    dropped = torch.stack([w for _, w in draws])
    assert bool(((dropped == 0) | ((dropped - 2 * weights).abs() < 1e-12)).all())
    assert_close(torch.stack([o for o, _ in draws]).mean(0), exact, atol=0.1)


def test_gradients_reach_every_input() -> None:
    inputs = {name: value.requires_grad_() for name, value in _inputs(2, 3).items()}
    torch.autograd.gradcheck(
        lambda *values: absorbed_attention(*values, None, scaling=0.6, softcap=3.0),
        tuple(inputs.values()),
    )


def _multiplications(
    absorbed: bool, tokens: int, keys: int, rank: int, rope: int, nope: int, value: int
) -> int:
    """Multiplications of one head, counted as they are done."""
    new = torch.zeros
    with FlopCounterMode(display=False) as counter:
        if absorbed:
            query_latent = new(tokens, nope) @ new(nope, rank)
            output, _ = absorbed_attention(
                query_latent[None, None],
                new(1, 1, tokens, rope),
                new(1, 1, keys, rank),
                new(1, 1, keys, rope),
                None,
                scaling=1.0,
            )
            output[0, 0] @ new(rank, value)
        else:
            expanded = new(keys, rank) @ new(rank, nope + value)
            scores = new(tokens, nope + rope) @ new(nope + rope, keys)
            scores @ expanded[:, nope:]
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize(
    "widths",
    [
        {"rank": 512, "rope": 64, "nope": 128, "value": 128},
        {"rank": 256, "rope": 32, "nope": 64, "value": 64},
        {"rank": 12, "rope": 4, "nope": 8, "value": 10},
        {"rank": 96, "rope": 16, "nope": 16, "value": 32},
    ],
)
def test_the_form_with_fewer_multiplications_is_preferred(widths: dict[str, int]) -> None:
    outcomes = set()
    for tokens in (1, 2, 3, 8, 20):
        for keys in (1, 2, 3, 8, 20, 200, 1000):
            counts = [_multiplications(form, tokens, keys, **widths) for form in (True, False)]
            outcomes.add(preferred := prefers_absorbed(tokens, keys, **widths))
            assert preferred == (counts[0] < counts[1]), (tokens, keys, counts)
    assert outcomes == {True, False}


def test_scores_never_take_more_than_the_keys_and_values_they_stand_for() -> None:
    narrow = {"rank": 8, "rope": 4, "nope": 64, "value": 64}
    assert prefers_absorbed(132, 4096, **narrow)
    assert not prefers_absorbed(133, 4096, **narrow)

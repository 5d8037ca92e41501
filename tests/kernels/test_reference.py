"""The reference of the kernels against torch's own attention, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kvpatch.kernels import reference
from kvpatch.kernels.reference import causal_span

B, H, HKV, T, K, D, DV, DR = 2, 6, 2, 7, 12, 8, 10, 4
SCALE = 0.4


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.fixture
def qkv(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(draw, B, H, T, D),
        _random(draw, B, HKV, K, D),
        _random(draw, B, HKV, K, DV),
    )


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    return output.transpose(1, 2)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_causal_with_a_cache_and_shared_heads(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    output, total = reference.attention(*qkv, causal_span(B, T, K), scale=SCALE)
    mask = torch.ones(T, K, dtype=torch.bool).tril(K - T)
    _close(output, _sdpa(*qkv, mask))
    repeated = [tensor.repeat_interleave(H // HKV, 1) for tensor in qkv[1:]]
    bias = torch.zeros(T, K, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    scores = torch.einsum("bhtd,bhkd->bhtk", qkv[0], repeated[0]) * SCALE + bias
    _close(total, scores.logsumexp(-1))


def test_window(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    output, _ = reference.attention(*qkv, causal_span(B, T, K, window=3), scale=SCALE)
    ones = torch.ones(T, K, dtype=torch.bool)
    _close(output, _sdpa(*qkv, ones.tril(K - T) & ones.triu(K - T - 2)))


def test_nothing_seen_is_zero(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    span = causal_span(B, T, K).clone()
    span[1, :3] = 4
    output, total = reference.attention(*qkv, span, scale=SCALE)
    assert not output[1, :3].any()
    assert (total[1, :, :3] == -torch.inf).all()
    assert output.isfinite().all()
    assert total[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_softcap_alibi_and_log_sums(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    cap = 1.5
    slopes = torch.linspace(0.1, 0.9, H, dtype=torch.float64)

    def score_mod(score: Tensor, _: Tensor, h: Tensor, t: Tensor, n: Tensor) -> Tensor:
        capped = torch.tanh(score / cap) * cap + slopes[h] * (n - (t + K - T))
        return torch.where(n <= t + K - T, capped, -torch.inf)

    output, total = reference.attention(
        *qkv, causal_span(B, T, K), scale=SCALE, softcap=cap, slopes=slopes
    )
    expected, aux = flex_attention(
        *qkv,
        score_mod=score_mod,
        scale=SCALE,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    _close(output, expected.transpose(1, 2))
    _close(total, aux.lse)


def test_rotary_parts_apart_are_wider_heads(
    qkv: tuple[Tensor, Tensor, Tensor], draw: torch.Generator
) -> None:
    query_rope, key_rope = _random(draw, B, H, T, DR), _random(draw, B, 1, K, DR)
    key_scale = _random(draw, B, HKV, K)
    query, key, value = qkv
    output, _ = reference.attention(
        query,
        key,
        value,
        causal_span(B, T, K),
        scale=SCALE,
        query_rope=query_rope,
        key_rope=key_rope,
        key_scale=key_scale,
    )
    wide = torch.cat((key, key_rope.expand(-1, HKV, -1, -1)), -1) * key_scale.unsqueeze(-1)
    mask = torch.ones(T, K, dtype=torch.bool).tril(K - T)
    _close(output, _sdpa(torch.cat((query, query_rope), -1), wide, value, mask))


def test_latent_attention_is_that_of_one_key_head(draw: torch.Generator) -> None:
    rank = 9
    query, query_rope = _random(draw, B, H, T, rank), _random(draw, B, H, T, DR)
    latent, key_rope = _random(draw, B, 1, K, rank), _random(draw, B, 1, K, DR)
    key_scale = _random(draw, B, HKV, K)
    output, _ = reference.latent_attention(
        query, query_rope, latent, key_rope, causal_span(B, T, K), scale=SCALE, key_scale=key_scale
    )
    wide = torch.cat((latent, key_rope), -1) * key_scale.unsqueeze(-1)
    mask = torch.ones(T, K, dtype=torch.bool).tril(K - T)
    expected = _sdpa(torch.cat((query, query_rope), -1), wide, latent.expand(-1, HKV, -1, -1), mask)
    _close(output, expected)

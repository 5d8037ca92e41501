"""What the fused ops compute, written out in torch: the truth that they are tested against.

Nothing is saved here: scores of all queries and keys stand in memory at once. Results are in
float64 where the inputs are, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "causal_span", "latent_attention", "visible"]


def causal_span(
    batch: int, queries: int, keys: int, *, window: int | None = None, device: str = "cpu"
) -> Tensor:
    """Spans [B, T, 2] of the last ``queries`` of ``keys`` tokens, each of which sees those before.

    Args:
        batch: Sequences B.
        queries: Query tokens T.
        keys: Keys K of all tokens, those of the queries included.
        window: Keys that a query sees, itself included; all if None.
        device: Where the spans are to be.
    """
    end = torch.arange(keys - queries + 1, keys + 1, device=device, dtype=torch.int32)
    start = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    return torch.stack((start, end), -1).expand(batch, -1, -1)


def visible(span: Tensor, keys: int) -> Tensor:
    """Which keys each query sees, bool [B, T, K].

    Args:
        span: int32 [B, T, 2].
        keys: Number of keys K.
    """
    at = torch.arange(keys, device=span.device)
    return (at >= span[..., :1]) & (at < span[..., 1:])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys of its span.

    The score of a query and a key is their product, plus that of the rotary parts where they are
    apart, times ``key_scale``, times ``scale``, bounded by ``softcap``, plus the ALiBi bias.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, K, D], where H is a multiple of Hkv.
        value: [B, Hkv, K, Dv].
        span: int32 [B, T, 2].
        scale: Factor on the scores.
        softcap: Scores are bounded to plus and minus this by a tanh; not at all if None.
        slopes: [H], of ALiBi (arXiv:2108.12409): the bias is the slope times the distance of the
            key from the last key of the span, a number from 0 downwards.
        query_rope: [B, H, T, Dr].
        key_rope: [B, 1, K, Dr], one for all heads.
        key_scale: [B, Hkv, K], one factor for each key and head.

    Returns:
        Output [B, T, H, Dv], and the natural logarithm of the sum of exponentials [B, H, T], minus
        infinity where nothing is seen.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.to(precise).repeat_interleave(groups, 1) for t in (key, value))
    scores = query.to(precise) @ keys.transpose(-1, -2)
    if query_rope is not None and key_rope is not None:
        scores = scores + query_rope.to(precise) @ key_rope.to(precise).transpose(-1, -2)
    if key_scale is not None:
        scores = scores * key_scale.to(precise).repeat_interleave(groups, 1).unsqueeze(2)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        at = torch.arange(key.shape[2], device=key.device)
        distance = (at - (span[..., 1:] - 1)).unsqueeze(1)
        scores = scores + slopes.to(precise)[:, None, None] * distance
    seen = visible(span, key.shape[2]).unsqueeze(1)
    scores = scores.masked_fill(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - total.nan_to_num(neginf=0.0).unsqueeze(-1))
    return (weights @ values).transpose(1, 2), total


def latent_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    span: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

    Args:
        query: [B, H, T, R], times the key up-projection.
        query_rope: [B, H, T, Dr]; Dr may be 0.
        latent: [B, 1, K, R], key and value of all heads.
        key_rope: [B, 1, K, Dr].
        span: int32 [B, T, 2].
        scale: Factor on the scores.
        softcap: As in ``attention``.
        key_scale: [B, Hkv, K], where H is a multiple of Hkv: one factor for each key and group of
            heads.

    Returns:
        Latent outputs [B, T, H, R], and log-sums [B, H, T] as in ``attention``.
    """
    groups = 1 if key_scale is None else key_scale.shape[1]
    latent = latent.expand(-1, groups, -1, -1)
    return attention(
        query,
        latent,
        latent,
        span,
        scale=scale,
        softcap=softcap,
        query_rope=query_rope,
        key_rope=key_rope,
        key_scale=key_scale,
    )

"""Attention scores written out, and the masks and biases that are added to them.

A mask is a tensor [B, 1, T, K], bool or additive, or *spans*: int32 [B, 1, T, 2], the first key
that each query sees and the one after the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FUSED",
    "alibi_slopes",
    "combined_mask",
    "eager_attention",
    "narrowed",
    "packed_span",
    "span_of",
    "visible",
]

# name of the attention function of kvpatch, where that is installed
FUSED = "kvpatch_triton"


def packed_span(span: Tensor) -> Tensor:
    """Spans as a bool tensor [B, 1, T, 2, 4] of the same bytes.

    A model that makes a bool of every mask leaves such a one alone.
    """
    return span.unsqueeze(-1).view(torch.bool)


def span_of(mask: Tensor | None) -> Tensor | None:
    """The spans [B, 1, T, 2] in a mask, or None if it is another or there is none."""
    if mask is None:
        return None
    if mask.ndim == 5:
        return mask.view(torch.int32).squeeze(-1)
    return mask if mask.dtype == torch.int32 else None


def narrowed(span: Tensor, window: int) -> Tensor:
    """Spans of which a window is left, the last keys."""
    start, end = span.unbind(-1)
    return torch.stack((torch.maximum(start, end - window), end), -1)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Slopes [H] of ALiBi (arXiv:2108.12409, section 3), in float32.

    Powers of ``2 ** (-8 / n)``, where n is the greatest power of two that is not above H; heads
    beyond n have every other one of those of 2n.
    """
    whole = 1 << (heads.bit_length() - 1)
    first = (1 + torch.arange(whole, device=device)) * (8 / whole)
    others = (1 + 2 * torch.arange(heads - whole, device=device)) * (4 / whole)
    return torch.exp2(-torch.cat((first, others)))


def visible(
    tokens: int, keys: int, seen: int | Tensor, window: int | None, device: torch.device
) -> Tensor:
    """Which of ``keys`` each of ``tokens`` may attend to, bool [T, K].

    Args:
        tokens: Query tokens, the first of them at position ``seen``.
        keys: Keys from position 0 on; with a static cache some are not written yet.
        seen: Tokens before this forward pass.
        window: Keys that a token sees, itself included; all if None.
        device: Where the mask is to be.
    """
    query_at = seen + torch.arange(tokens, device=device)[:, None]
    key_at = torch.arange(keys, device=device)
    causal = key_at <= query_at
    return causal if window is None else causal & (key_at > query_at - window)


def combined_mask(
    mask: Tensor | None, allowed: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """One mask out of three: what is allowed in both, with the bias added to the scores.

    Args:
        mask: Bool or additive [B, 1, T, K], or None.
        allowed: Bool [T, K], or None for everything.
        bias: Additive [.., 1 or T, K], or None.
        dtype: Of the scores.

    Returns:
        Bool where there is no bias and no additive mask, else additive.
    """
    lowest = torch.finfo(dtype).min
    if mask is None or mask.dtype == torch.bool:
        keep = allowed if mask is None else mask if allowed is None else mask & allowed
        if bias is None or keep is None:
            return keep if bias is None else bias
        return torch.where(keep, bias.to(dtype), lowest)
    mask = mask if allowed is None else mask.masked_fill(~allowed, lowest)
    return mask if bias is None else mask + bias


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with scores and softmax in float32 at least.

    Args:
        module: The attention module, for its training mode.
        query: [B, H, T, D].
        key: [B, Hkv, K, D], where H is a multiple of Hkv.
        value: [B, Hkv, K, Dv].
        attention_mask: Bool or additive, broadcast to [B, H, T, K].
        scaling: Factor on the scores.
        dropout: Of the attention weights.
        softcap: Cap of the scores by tanh.
        **kwargs: Ignored, what other attention functions want.

    Returns:
        Output [B, T, H, Dv] and attention weights [B, H, T, K].
    """
    batch, heads, tokens, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    precise = torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(batch, kv_heads, -1, query.shape[-1]).to(precise)
    scores = (rows @ key.to(precise).transpose(-1, -2)).view(batch, heads, tokens, keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(precise).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    output = weights.view(batch, kv_heads, -1, keys) @ value
    return output.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), weights

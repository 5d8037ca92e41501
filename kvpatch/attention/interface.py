"""``kvpatch_triton``: fused attention under the name by which models of transformers ask for it.

What no kernel computes, torch does: the attention function of ``sdpa``, or scores written out. A
warning says so, once for each reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvpatch.attention import fused, unfused
from kvpatch.attention.masks import span_mask
from kvpatch.errors import UsageError
from kvpatch.models.scores_kvpatch import FUSED, span_of

__all__ = ["attention_forward", "beyond_kernels"]

# arguments that change what is computed, of which the kernels know nothing
_BEYOND_KERNELS: Mapping[str, str] = {
    "dropout": "it drops attention weights",
    "s_aux": "it has attention sinks",
    "position_bias": "it adds a bias to the scores",
    "output_attentions": "it is asked for its weights",
}
_LOG = logging.getLogger("kvpatch")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    slopes: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_scale: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the models of transformers ask for it.

    Args:
        module: The attention module, for ``is_causal`` and the file that it is from.
        query: [B, H, T, D].
        key: [B, Hkv, K, D], where H is a multiple of Hkv.
        value: [B, Hkv, K, Dv]; for attention to latents the key itself, with a rotary part apart.
        attention_mask: Spans, a dense mask (bool or additive, broadcast to [B, H, T, K]), or None
            for what ``is_causal`` says.
        scaling: Factor on the scores, ``D ** -0.5`` if None.
        softcap: Cap of the scores by tanh.
        is_causal: Whether None hides what comes after a query; if None, what the module says.
        slopes: [H], of ALiBi; beside spans only, because other masks have the bias in them.
        query_rope: [B, H, T, Dr].
        key_rope: [B, 1, K, Dr].
        key_scale: [B, groups of heads, K], factors on the scores; for attention to latents only.
        cu_seq_lens_q: Where the documents of one packed sequence begin, and where the last ends.
        **asked: Those in ``_BEYOND_KERNELS`` are heeded; others change nothing.

    Returns:
        Output [B, T, H, Dv], and the weights [B, H, T, K] if they were asked for.

    Raises:
        UsageError: The keys are in a paged cache, the documents are not those of one sequence, or
            the file of the module does not say how it computes what it asks for.
    """
    if asked.get("cache") is not None:
        raise UsageError(
            f"{FUSED} cannot read a paged cache",
            hint="For continuous batching use attn_implementation='sdpa'.",
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value, query_rope, key_rope = _operands(query, key, value, query_rope, key_rope)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if mask is None:
        mask = _span(query.shape[2], key.shape[2], causal, query.device)
    documents = None if cu_seq_lens_q is None else _documents(cu_seq_lens_q, query, key)
    span = _seen(mask, documents)
    op, why = fused.choose(query, key, value, query_rope=query_rope, slopes=slopes)
    why = beyond_kernels(asked) or why
    if span is None:
        why = why or "its mask cannot be said in spans"
    elif why is None:
        output = fused.attend(
            op,
            query,
            key,
            value,
            span.squeeze(1).expand(len(query), -1, -1),
            scale=scaling,
            softcap=softcap,
            slopes=slopes,
            query_rope=query_rope,
            key_rope=key_rope,
            key_scale=key_scale,
        )
        return output, None
    _say_even_when_traced(f"{FUSED} computes in torch: {why}")
    return unfused.attend(
        module,
        query,
        key,
        value,
        mask if span is None else span,
        implied=causal if attention_mask is None and documents is None else None,
        slopes=slopes,
        documents=documents,
        scaling=scaling,
        softcap=softcap,
        query_rope=query_rope,
        key_rope=key_rope,
        key_scale=key_scale,
        asked=asked,
    )


def beyond_kernels(asked: Mapping[str, Any]) -> str | None:
    """Which argument of an attention function no kernel heeds, or None if there is none such."""
    return next((why for name, why in _BEYOND_KERNELS.items() if _given(asked.get(name))), None)


def _given(argument: Any) -> bool:
    return isinstance(argument, Tensor) or bool(argument)


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Operands in the dtype of autocast, and rotary parts where there is another part beside them.

    One tensor as key and value stays one, which is how attention to latents is told.
    """
    same = value is key
    query, key = fused.autocast(query), fused.autocast(key)
    value = key if same else fused.autocast(value)
    if query_rope is None or key_rope is None:
        return query, key, value, query_rope, key_rope
    query_rope, key_rope = fused.autocast(query_rope), fused.autocast(key_rope)
    if not query.shape[-1]:  # all dims are rotary
        return query_rope, key_rope.expand(-1, value.shape[1], -1, -1), value, None, None
    if not (query_rope.shape[-1] or same):
        query_rope = key_rope = None
    return query, key, value, query_rope, key_rope


def _seen(mask: Tensor, documents: Tensor | None) -> Tensor | None:
    """Spans that a mask is, inside those of the documents; None if it cannot be said in spans."""
    span = span_of(mask)
    return span if span is None or documents is None else _both(span, documents)


def _span(tokens: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """Spans [1, 1, T, 2] that no mask stands for: the keys up to each query, or all of them.

    One query sees all keys; more of them are the first tokens of a sequence, as they are to the
    attention function of ``sdpa``.
    """
    at = torch.arange(1, tokens + 1, device=device, dtype=torch.int32)
    end = at if causal and tokens > 1 else torch.full_like(at, keys)
    return torch.stack((torch.zeros_like(end), end), -1)[None, None]


def _documents(bounds: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Spans [1, 1, T, 2] of the document that each query is in."""
    batch, _, tokens, _ = query.shape
    if batch != 1 or tokens != key.shape[2]:
        raise UsageError(
            f"cu_seq_lens_q bounds the documents of one sequence without a cache, but there are "
            f"{batch} sequences of {tokens} queries and {key.shape[2]} keys",
            hint="Put all documents into one sequence, or leave cu_seq_lens_q out and pad.",
        )
    at = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    # what stands after the last of them is one more
    bounds = nn.functional.pad(bounds, (0, 1), value=tokens)
    number = torch.searchsorted(bounds, at, right=True)
    return torch.stack((bounds[number - 1], bounds[number]), -1).to(torch.int32)[None, None]


def _both(span: Tensor, other: Tensor) -> Tensor:
    start = torch.maximum(span[..., 0], other[..., 0])
    end = torch.minimum(span[..., 1], other[..., 1])
    return torch.stack((start, torch.maximum(start, end)), -1)


@fused.constant
def _say_even_when_traced(message: str) -> None:
    _say(message)


@cache
def _say(message: str) -> None:
    _LOG.warning(message)


AttentionInterface.register(FUSED, attention_forward)
AttentionMaskInterface.register(FUSED, span_mask)

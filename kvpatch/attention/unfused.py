"""Attention in torch, where no kernel computes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpatch.errors import UsageError
from kvpatch.kernels.reference import visible
from kvpatch.models.absorbed_kvpatch import absorbed_attention
from kvpatch.models.scores_kvpatch import combined_mask, eager_attention, span_of

__all__ = ["attend", "dense_mask"]

# arguments that only the file of a model knows what to do with
_OF_THE_MODEL = ("s_aux", "position_bias")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    implied: bool | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_scale: Tensor | None = None,
    asked: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What ``attention_forward`` says, by means of torch.

    Args:
        module: The attention module.
        query: [B, H, T, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv], or the key itself.
        mask: Spans, or a dense mask.
        scaling: Factor on the scores.
        implied: The spans stand for no mask at all, which means this to the function of ``sdpa``:
            causal attention, or attention to all keys.
        softcap: Cap of the scores by tanh.
        slopes: [H], beside spans.
        documents: Spans of documents [1, 1, T, 2] that are not yet in a dense mask.
        query_rope: [B, H, T, Dr].
        key_rope: [B, 1, K, Dr].
        key_scale: [B, groups of heads, K], factors on the scores of latents.
        asked: Further arguments of the attention function.

    Returns:
        Output [B, T, H, Dv], and the weights [B, H, T, K] where they are at hand.

    Raises:
        UsageError: The file of the module does not say how it computes what is asked for.
    """
    asked = asked or {}
    if query_rope is not None and key_rope is not None and value is not key:
        query = torch.cat((query, query_rope), -1)
        key = torch.cat((key, key_rope.expand(-1, key.shape[1], -1, -1)), -1)
    special = any(asked.get(name) is not None for name in _OF_THE_MODEL)
    latent = query_rope is not None and value is key
    if not (special or latent or softcap is not None or asked.get("output_attentions")):
        dense = None if implied is not None else dense_mask(mask, key, slopes, documents)
        how = {**asked, "scaling": scaling, "is_causal": bool(implied)}
        output, _ = sdpa_attention_forward(module, query, key, value, dense, **how)
        return output, None

    dense = dense_mask(mask, key, slopes, documents)
    if latent and query_rope is not None and key_rope is not None:
        output, weights = absorbed_attention(
            query,
            query_rope,
            key,
            key_rope,
            dense,
            scaling=scaling,
            softcap=softcap,
            key_scale=key_scale,
        )
        return output.transpose(1, 2), weights
    eager: Any = eager_attention
    if special:
        eager, dense = _of_the_model(module), _additive(dense, query.dtype)
    outcome: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, dense, **{**asked, "scaling": scaling, "softcap": softcap}
    )
    return outcome


def dense_mask(
    mask: Tensor, key: Tensor, slopes: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """A mask [B, 1 or H, T, K] that says what spans and slopes do; a dense one stays what it is.

    Args:
        mask: Spans [B, 1, T, 2], or a dense mask.
        key: [B, Hkv, K, D], for K and the dtype.
        slopes: [H], of ALiBi, beside spans.
        documents: Spans [1, 1, T, 2] of what may be seen besides.

    Returns:
        Bool, or additive where the mask is or where there are slopes.
    """
    span, keys = span_of(mask), key.shape[2]
    allowed = None if documents is None else visible(documents, keys)
    bias = None
    if span is not None and slopes is not None:
        distance = torch.arange(keys, device=span.device) - (span[..., 1:] - 1)
        bias = slopes[:, None, None] * distance
    dense = combined_mask(mask if span is None else visible(span, keys), allowed, bias, key.dtype)
    assert dense is not None
    return dense


def _of_the_model(module: nn.Module) -> Any:
    """The attention of the file that a module is from, written out."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UsageError(
        f"{type(module).__name__} asks for attention sinks or a bias of the scores, and its file "
        "has no eager_attention_forward that says how they are computed",
        hint="Use another attention implementation for this model.",
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)

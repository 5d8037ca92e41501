"""Attention on compressed keys and values (MLA) without expanding them.

The up-projections of keys and values move over to the queries and to the outputs (DeepSeek-V2,
arXiv 2405.04434, section 2.1.2): then all heads read one cached latent as key and as value, as the
query heads of multi-query attention do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["absorbed_attention", "beyond_weight", "prefers_absorbed"]


def absorbed_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the latents themselves, all heads to the same ones.

    Args:
        query_latent: [B, H, T, R], the NoPE dims of the queries times the key up-projection.
        query_rope: [B, H, T, Dr], turned to their positions; Dr may be 0.
        latent: [B, 1, K, R], of all tokens in sight.
        key_rope: [B, 1, K, Dr], turned to their positions.
        mask: Bool (true where visible) or additive, broadcast to [B, H, T, K or more], where what
            is beyond K is cut off; None hides nothing, not even what comes after a query.
        scaling: Factor on the scores.
        softcap: Scores are bounded to plus and minus this by a tanh; not at all if None.
        dropout: Probability that a weight is dropped.
        key_scale: [B, Hkv, K], where H is a multiple of Hkv: one factor on the scores, before the
            softcap, for each key and group of heads.

    Returns:
        Latent outputs [B, H, T, R], still to be multiplied by the value up-projection, and the
        weights [B, H, T, K]. Those of a query that sees nothing mean nothing, but are finite.
    """
    batch, heads, tokens, rank = query_latent.shape
    # one product for each batch entry: heads are further rows, and the cache is read in place
    values = latent.squeeze(1)
    scores = _scores(
        query_latent.flatten(1, 2), values, query_rope.flatten(1, 2), key_rope, scaling
    )
    scores = scores.view(batch, heads, tokens, -1)
    if scores.dtype in {torch.float16, torch.bfloat16}:
        scores = scores.float()
    if key_scale is not None:
        grouped = scores.view(batch, key_scale.shape[1], -1, *scores.shape[2:])
        scores = (grouped * key_scale[:, :, None, None]).flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(_masked(scores, mask), -1).to(latent.dtype)
    weights = nn.functional.dropout(weights, dropout) if dropout else weights
    output = torch.bmm(weights.flatten(1, 2), values)
    return output.view(batch, heads, tokens, rank), weights


def prefers_absorbed(
    queries: int, keys: int, *, rank: int, rope: int, nope: int, value: int
) -> bool:
    """Whether to attend to the latents themselves rather than to the keys and values in them.

    It costs more for each pair of query and key and saves the expansion of each key. Only what
    takes fewer multiplications is preferred, and no more memory: the scores, ``queries`` numbers
    for each key and head, against the expanded key and value.

    Args:
        queries: Query tokens.
        keys: Tokens in sight, cached ones and those of the queries.
        rank: Latent dims R.
        rope: Rotary dims Dr of a key.
        nope: Other dims Dn of a key.
        value: Dims Dv of a value.
    """
    expanded_width = nope + rope + value
    up_projection = rank * (nope + value)  # of one token, for each head
    absorbed = queries * (keys * (2 * rank + rope) + up_projection)
    expanded = keys * (queries * expanded_width + up_projection)
    return queries <= expanded_width and absorbed < expanded


def beyond_weight(kv_b_proj: nn.Module) -> str | None:
    """What makes an up-projection more than its weight, which the absorbed form reads; or None.

    Adapters and quantisation change the class, sharding that of the weight, and placement by
    accelerate the forward method.
    """
    if (
        type(kv_b_proj) is not nn.Linear
        or kv_b_proj.bias is not None
        or "forward" in vars(kv_b_proj)
    ):
        return f"its kv_b_proj is not a plain linear layer ({type(kv_b_proj).__name__})"
    if kv_b_proj._forward_hooks or kv_b_proj._forward_pre_hooks:
        return "its kv_b_proj has hooks"
    if kv_b_proj._backward_hooks or kv_b_proj._backward_pre_hooks:
        return "its kv_b_proj has backward hooks"
    if type(kv_b_proj.weight) not in {nn.Parameter, Tensor}:
        return f"the weight of its kv_b_proj is a {type(kv_b_proj.weight).__name__}"
    return None


def _scores(
    query_latent: Tensor, latent: Tensor, query_rope: Tensor, key_rope: Tensor, scaling: float
) -> Tensor:
    """Scores [B, H * T, K] of queries in rows."""
    scores = torch.bmm(query_latent * scaling, latent.transpose(1, 2))
    if not query_rope.shape[-1]:
        return scores
    return torch.baddbmm(scores, query_rope * scaling, key_rope.squeeze(1).transpose(1, 2))


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [B, H, T, K] with what is hidden at the lowest number, which keeps them finite."""
    if mask is None:
        return scores
    mask = mask[..., : scores.shape[-1]]
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, lowest)
    return (scores + mask).clamp(min=lowest)

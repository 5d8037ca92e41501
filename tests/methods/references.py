"""Attention of one window in plain float64 formulas, to compare the forms of a layer with.

RoPE is a matrix for each position, and scores are sums over the entries of the definitions; nothing
here is used by the code that is compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer
from convert.methods.attention import plane_order, with_head_order
from convert.methods.fitting import Observed
from tests.methods.layers import causal, randn

__all__ = [
    "causal_weights",
    "frequencies",
    "heads_of",
    "latent_outcome",
    "latent_scores",
    "observed_of",
    "original_outcome",
    "original_scores",
    "outcome_of",
    "pairs_of",
    "positive",
]


def frequencies(planes: int) -> Tensor:
    """[P] radians per token, those of ``layers.causal``."""
    return 0.7 ** torch.arange(planes, dtype=torch.float64)


def pairs_of(layer: AttentionLayer) -> list[tuple[int, int]]:
    """The two dims of each RoPE plane of a head."""
    rope = layer.rope
    assert rope is not None
    half = rope.dim // 2
    return [(2 * p, 2 * p + 1) if rope.interleaved else (p, p + half) for p in range(half)]


def heads_of(layer: AttentionLayer, part: str, inputs: Tensor) -> Tensor:
    """Heads [T, n, D] of a projection for inputs [T, E]."""
    heads = torch.einsum("nde,te->tnd", getattr(layer, part), inputs)
    bias = getattr(layer, f"{part}_bias")
    return heads if bias is None else heads + bias


def original_scores(layer: AttentionLayer, inputs: Tensor, turning: Tensor, scale: float) -> Tensor:
    """[H, T, T] of inputs [T, E]; ``turning`` [P] are radians per token."""
    rotation = _rotations(len(inputs), pairs_of(layer), turning, layer.geometry.head_dim)
    query = torch.einsum("tfd,tnd->ntf", rotation, heads_of(layer, "q", inputs))
    key = torch.einsum("tfd,tnd->ntf", rotation, heads_of(layer, "k", inputs))
    return scale * torch.einsum("htf,hsf->hts", query, _for_each(layer, key, 0))


def original_outcome(
    layer: AttentionLayer, inputs: Tensor, turning: Tensor, scale: float
) -> Tensor:
    """[T, E] that attention adds to the residual stream."""
    return outcome_of(layer, original_scores(layer, inputs, turning, scale), inputs)


def outcome_of(layer: AttentionLayer, scores: Tensor, inputs: Tensor) -> Tensor:
    """[T, E] for given scores [H, T, T]."""
    value = _for_each(layer, heads_of(layer, "v", inputs), 1)
    found = torch.einsum("hts,shd,ehd->te", causal_weights(scores), value, layer.o)
    return found if layer.o_bias is None else found + layer.o_bias


def latent_scores(
    layer: LatentLayer, inputs: Tensor, turning: Tensor, read: Tensor | None = None
) -> Tensor:
    """[H, T, T] of a latent layer; ``turning`` [P] are those of the source's planes.

    Keys are made of ``read`` [T, E] if it is given, as where layers share a latent.
    """
    read = inputs if read is None else read
    nope, width = layer.geometry.nope_dim, layer.geometry.rope_dim
    pairs = [(2 * i, 2 * i + 1) for i in range(width // 2)]
    rotation = _rotations(len(inputs), pairs, turning[list(layer.planes)], width)
    query = torch.einsum("hde,te->htd", layer.q, inputs)
    if layer.q_bias is not None:
        query = query + layer.q_bias[:, None]
    rope_key = read @ layer.k_rope.T
    if layer.k_rope_bias is not None:
        rope_key = rope_key + layer.k_rope_bias
    still = torch.einsum("htd,hdr,sr->hts", query[..., :nope], layer.k_up, read @ layer.latent.T)
    turned = torch.einsum("tfd,htd,sfg,sg->hts", rotation, query[..., nope:], rotation, rope_key)
    return layer.scale * (still + turned)


def latent_outcome(
    layer: LatentLayer, inputs: Tensor, turning: Tensor, read: Tensor | None = None
) -> Tensor:
    """[T, E] that a latent layer adds to the residual stream; see ``latent_scores``."""
    read = inputs if read is None else read
    mixing = causal_weights(latent_scores(layer, inputs, turning, read))
    value = torch.einsum("hdr,re,te->thd", layer.v_up, layer.latent, read)
    found = torch.einsum("hts,shd,ehd->te", mixing, value, layer.o)
    return found if layer.o_bias is None else found + layer.o_bias


def causal_weights(scores: Tensor) -> Tensor:
    """Softmax over what is not later than the query."""
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def observed_of(layer: AttentionLayer, inputs: Tensor, **options: Any) -> Observed:
    """What a causal layer does on windows [N, T, E]."""
    assert layer.rope is not None
    planes = layer.rope.dim // 2
    scoring = dataclasses.replace(causal(inputs.shape[1], planes), **options)
    outputs = [original_outcome(layer, x, frequencies(planes), scoring.scale) for x in inputs]
    return Observed(
        layer=with_head_order(layer, plane_order(layer)),
        scoring=scoring,
        query_order=tuple(range(layer.geometry.heads)),
        before=inputs,
        inputs=inputs,
        outputs=torch.stack(outputs),
    )


def positive(size: int, seed: int) -> Tensor:
    """A random positive definite matrix."""
    root = randn(size, size, seed=seed)
    return root @ root.T


def _rotations(tokens: int, pairs: list[tuple[int, int]], turning: Tensor, width: int) -> Tensor:
    """RoPE as matrices [T, D, D]: pair (i, j) turns by ``t * turning`` at position t."""
    matrices = torch.eye(width, dtype=torch.float64).repeat(tokens, 1, 1)
    for (i, j), speed in zip(pairs, turning, strict=True):
        angle = torch.arange(tokens) * speed
        matrices[:, i, i] = matrices[:, j, j] = angle.cos()
        matrices[:, j, i] = angle.sin()
        matrices[:, i, j] = -angle.sin()
    return matrices


def _for_each(layer: AttentionLayer, heads: Tensor, dim: int) -> Tensor:
    """KV heads, once for each query head that reads them."""
    own = [head // layer.geometry.group for head in range(layer.geometry.heads)]
    return heads.index_select(dim, torch.tensor(own))

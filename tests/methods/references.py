"""Attention of one window in plain float64 formulas, to compare the forms of a layer with.

RoPE is a matrix for each position, and scores are sums over the entries of the definitions; nothing
here is used by the code that is compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attention import plane_order, with_head_order
from convert.methods.fitting import Observed
from tests.methods.layers import causal, randn

__all__ = [
    "EPS",
    "NORMS",
    "causal_weights",
    "frequencies",
    "heads_of",
    "key_factors_of",
    "latent_outcome",
    "latent_scores",
    "normed",
    "observed_of",
    "original_outcome",
    "original_scores",
    "outcome_of",
    "pairs_of",
    "positive",
    "with_norms",
]

EPS = 1e-3
NORMS = {
    "shared": QkNorm("shared", "rms"),
    "plus one": QkNorm("shared", "rms_plus_one"),
    "full": QkNorm("full", "rms"),
    "layer": QkNorm("per_head", "layer"),
}


def frequencies(planes: int) -> Tensor:
    """[P] radians per token, those of ``layers.causal``."""
    return 0.7 ** torch.arange(planes, dtype=torch.float64)


def pairs_of(layer: AttentionLayer) -> list[tuple[int, int]]:
    """The two dims of each RoPE plane of a head."""
    rope = layer.rope
    assert rope is not None
    half = rope.dim // 2
    return [(2 * p, 2 * p + 1) if rope.interleaved else (p, p + half) for p in range(half)]


def heads_of(layer: AttentionLayer | LatentLayer, part: str, inputs: Tensor) -> Tensor:
    """Heads [T, n, D] of a projection for inputs [T, E]."""
    heads = torch.einsum("nde,te->tnd", getattr(layer, part), inputs)
    bias = getattr(layer, f"{part}_bias")
    return heads if bias is None else heads + bias


def with_norms(layer: AttentionLayer, norm: QkNorm | None, *, seed: int) -> AttentionLayer:
    """The layer with random weights of its norms."""
    if norm is None:
        return layer
    sizes = layer.geometry
    shared = norm.layout == "shared"
    shapes = [
        (sizes.head_dim,) if shared else (n, sizes.head_dim) for n in (sizes.heads, sizes.kv_heads)
    ]
    q_norm, k_norm = (1 + 0.4 * randn(*shape, seed=seed + n) for n, shape in enumerate(shapes))
    return dataclasses.replace(layer, q_norm=q_norm, k_norm=k_norm)


def normed(heads: Tensor, norm: QkNorm | None, weight: Tensor | None) -> Tensor:
    """Heads [T, n, D] after a norm, by the functions of torch."""
    if norm is None:
        return heads
    assert weight is not None
    if norm.layout == "full":
        flat = heads.flatten(1)
        return rms_norm(flat, flat.shape[1:], weight.flatten(), EPS).view(heads.shape)
    width = heads.shape[2:]
    if norm.formula == "layer":
        return layer_norm(heads, width, eps=EPS) * weight
    return rms_norm(heads, width, eps=EPS) * (weight + (norm.formula == "rms_plus_one"))


def key_factors_of(layer: AttentionLayer | LatentLayer, norm: QkNorm, inputs: Tensor) -> Tensor:
    """[T, Hkv] what the norm of keys divides by, inverted."""
    keys = heads_of(layer, "k", inputs)
    if norm.layout == "full":
        each = (keys.square().mean((1, 2)) + EPS).rsqrt()
        return each[:, None].expand(-1, keys.shape[1])
    if norm.formula == "layer":
        return (keys.var(2, unbiased=False) + EPS).rsqrt()
    return (keys.square().mean(2) + EPS).rsqrt()


def original_scores(
    layer: AttentionLayer,
    inputs: Tensor,
    turning: Tensor,
    scale: float,
    norm: QkNorm | None = None,
) -> Tensor:
    """[H, T, T] of inputs [T, E]; ``turning`` [P] are radians per token."""
    rotation = _rotations(len(inputs), pairs_of(layer), turning, layer.geometry.head_dim)
    query = normed(heads_of(layer, "q", inputs), norm, layer.q_norm)
    key = normed(heads_of(layer, "k", inputs), norm, layer.k_norm)
    query = torch.einsum("tfd,tnd->ntf", rotation, query)
    key = torch.einsum("tfd,tnd->ntf", rotation, key)
    return scale * torch.einsum("htf,hsf->hts", query, _for_each(layer, key, 0))


def original_outcome(
    layer: AttentionLayer,
    inputs: Tensor,
    turning: Tensor,
    scale: float,
    norm: QkNorm | None = None,
) -> Tensor:
    """[T, E] that attention adds to the residual stream."""
    return outcome_of(layer, original_scores(layer, inputs, turning, scale, norm), inputs)


def outcome_of(layer: AttentionLayer, scores: Tensor, inputs: Tensor) -> Tensor:
    """[T, E] for given scores [H, T, T]."""
    value = _for_each(layer, heads_of(layer, "v", inputs), 1)
    found = torch.einsum("hts,shd,ehd->te", causal_weights(scores), value, layer.o)
    return found if layer.o_bias is None else found + layer.o_bias


def latent_scores(
    layer: LatentLayer,
    inputs: Tensor,
    turning: Tensor,
    norm: QkNorm | None = None,
    *,
    read: Tensor | None = None,
) -> Tensor:
    """[H, T, T] of a latent layer; ``turning`` [P] are those of the source's planes.

    Keys are made of ``read`` [T, E] if it is given, as where layers share a latent.
    """
    read = inputs if read is None else read
    nope, width = layer.geometry.nope_dim, layer.geometry.rope_dim
    pairs = [(2 * i, 2 * i + 1) for i in range(width // 2)]
    rotation = _rotations(len(inputs), pairs, turning[list(layer.planes)], width)
    query = normed(heads_of(layer, "q", inputs), norm, layer.q_norm).transpose(0, 1)
    if layer.q_rope is not None:
        query = torch.cat([query, torch.einsum("hfd,htd->htf", layer.q_rope, query)], -1)
    rope_key = read @ layer.k_rope.T
    if layer.k_rope_bias is not None:
        rope_key = rope_key + layer.k_rope_bias
    still = torch.einsum("htd,hdr,sr->hts", query[..., :nope], layer.k_up, _latents(layer, read))
    turned = torch.einsum("tfd,htd,sfg,sg->hts", rotation, query[..., nope:], rotation, rope_key)
    scores = layer.scale * (still + turned)
    if norm is None:
        return scores
    factors = key_factors_of(layer, norm, read)
    return scores * factors.T.repeat_interleave(len(scores) // factors.shape[1], 0)[:, None]


def latent_outcome(
    layer: LatentLayer,
    inputs: Tensor,
    turning: Tensor,
    norm: QkNorm | None = None,
    *,
    read: Tensor | None = None,
) -> Tensor:
    """[T, E] that a latent layer adds to the residual stream; see ``latent_scores``."""
    mixing = causal_weights(latent_scores(layer, inputs, turning, norm, read=read))
    latents = _latents(layer, inputs if read is None else read)
    value = torch.einsum("hdr,tr->thd", layer.v_up, latents)
    found = torch.einsum("hts,shd,ehd->te", mixing, value, layer.o)
    return found if layer.o_bias is None else found + layer.o_bias


def _latents(layer: LatentLayer, inputs: Tensor) -> Tensor:
    latents = inputs @ layer.latent.T
    return latents if layer.latent_bias is None else latents + layer.latent_bias


def causal_weights(scores: Tensor) -> Tensor:
    """Softmax over what is not later than the query."""
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def observed_of(layer: AttentionLayer, inputs: Tensor, **options: Any) -> Observed:
    """What a causal layer does on windows [N, T, E]."""
    assert layer.rope is not None
    planes = layer.rope.dim // 2
    scoring = dataclasses.replace(causal(inputs.shape[1], planes), **options)
    given = frequencies(planes), scoring.scale, scoring.norm
    outputs = [original_outcome(layer, x, *given) for x in inputs]
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

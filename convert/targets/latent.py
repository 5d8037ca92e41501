"""The classes of kvpatch with latent attention (MLA): any rank in any layer, shared or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.layer import AttentionLayer, Geometry, LatentLayer
from convert.targets.patched import patched_class
from convert.targets.target import Target

__all__ = ["latent_class", "pack_latent"]


def latent_class(
    facts: ModelFacts,
    *,
    ranks: Sequence[int],
    planes: Sequence[Sequence[int]],
    nope_dim: int,
    value_dim: int,
    kv_source_layers: Sequence[int] | None,
) -> Target | None:
    """The kvpatch class of the source's family with latent attention; None where there is none.

    Its fold takes a ``LatentLayer`` and writes all of it. Names and tensors outside the attention
    stay those of the stock class.

    Args:
        facts: The source. Clamps have no place in latent attention, nor has a norm of keys that
            is more than a factor.
        ranks: Latent dims of each layer, those of the layer it reads for one that reads another's.
        planes: For each layer and each pair of its rotary key the RoPE plane of the source.
        nope_dim: Dims of a query or key without positions; a layer with fewer gets zeros.
        value_dim: Dims of a value.
        kv_source_layers: For each layer the one whose latents it reads; None if all have their own.
    """
    normed = facts.qk_norm is not None
    if facts.clip is not None or (normed and not facts.key_scales):
        return None
    geometry = facts.geometry
    kv_heads = geometry.kv_heads if normed else geometry.heads
    plain = patched_class(facts, kv_heads=kv_heads, kv_source_layers=kv_source_layers)
    if plain is None:
        return None
    keys = {
        "kv_lora_rank": list(ranks),
        "kv_rope_planes": [list(pairs) for pairs in planes],
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": value_dim,
    }
    return dataclasses.replace(
        plain,
        edit=partial(_edit, edit=plain.edit, keys=keys),
        reads=frozenset({"q", "k", "v", "o"}),
        fold=partial(_fold, prefix=f"{plain.family.attention}.", nope_dim=nope_dim),
    )


def pack_latent(layer: LatentLayer, prefix: str) -> dict[str, Tensor]:
    """Tensors of a latent layer as the classes of kvpatch have them, in the dtype of its fields.

    Args:
        layer: The layer. One that reads the latents of another has no ``kv_a_proj_with_mqa``; it
            is one whose ``latent``, ``k_rope`` and ``k`` have no rows.
        prefix: What the names begin with.

    Returns:
        Contiguous tensors by name, but for the query norm; biases that the layer does not have are
        zeros.
    """
    q, o = layer.q, layer.o
    tensors = {
        "q_proj.weight": q.flatten(0, 1),
        "q_proj.bias": _or_zeros(layer.q_bias, q[..., 0]).flatten(),
        "kv_b_proj.weight": torch.cat([layer.k_up, layer.v_up], 1).flatten(0, 1),
        "o_proj.weight": o.flatten(1),
        "o_proj.bias": _or_zeros(layer.o_bias, o[:, 0, 0]),
    }
    if len(layer.latent):
        latent_bias = _or_zeros(layer.latent_bias, layer.latent[:, 0])
        rope_bias = _or_zeros(layer.k_rope_bias, layer.k_rope[:, 0])
        tensors |= {
            "kv_a_proj_with_mqa.weight": torch.cat([layer.latent, layer.k_rope]),
            "kv_a_proj_with_mqa.bias": torch.cat([latent_bias, rope_bias]),
        }
    if layer.q_rope is not None and layer.geometry.rope_dim:
        tensors["q_rope.weight"] = layer.q_rope
    if layer.k is not None and len(layer.k):
        tensors |= {
            "k_proj.weight": layer.k.flatten(0, 1),
            "k_proj.bias": _or_zeros(layer.k_bias, layer.k[..., 0]).flatten(),
        }
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def _edit(
    config: Mapping[str, Any],
    *,
    edit: Callable[[Mapping[str, Any]], dict[str, Any]],
    keys: Mapping[str, object],
) -> dict[str, Any]:
    return {**edit(config), **keys}


def _fold(
    layer: LatentLayer, _: Mapping[str, Tensor], *, prefix: str, nope_dim: int
) -> tuple[AttentionLayer | None, Mapping[str, Tensor]]:
    return _query_norm(layer), pack_latent(_widened(layer, nope_dim), prefix)


def _query_norm(layer: LatentLayer) -> AttentionLayer | None:
    """The query norm, which stays what and where it was."""
    if layer.q_norm is None:
        return None
    sizes = layer.geometry
    return AttentionLayer(
        geometry=Geometry(
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.nope_dim,
            value_dim=sizes.value_dim,
        ),
        q_norm=layer.q_norm,
        q_norm_bias=layer.q_norm_bias,
    )


def _widened(layer: LatentLayer, nope_dim: int) -> LatentLayer:
    """A layer with zeros for the NoPE dims that other layers of the model have and it has not."""
    geometry = layer.geometry
    more = nope_dim - geometry.nope_dim
    if not more:
        return layer

    def wide(heads: Tensor) -> Tensor:
        """[H, Dn, ...] with more rows of zeros, before whatever comes after the NoPE dims."""
        zeros = heads.new_zeros(len(heads), more, *heads.shape[2:])
        split = geometry.nope_dim
        return torch.cat([heads[:, :split], zeros, heads[:, split:]], 1)

    return dataclasses.replace(
        layer,
        geometry=dataclasses.replace(geometry, nope_dim=nope_dim),
        q=wide(layer.q),
        q_bias=None if layer.q_bias is None else wide(layer.q_bias),
        k_up=wide(layer.k_up),
    )


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias

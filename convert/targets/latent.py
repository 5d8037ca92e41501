"""The classes of kvpatch with latent attention (MLA): any rank in any layer, shared or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.layer import AttentionLayer, Geometry, LatentGeometry, LatentLayer
from convert.targets.patched import patched_class
from convert.targets.target import Target

__all__ = ["latent_class", "latent_layer", "latent_shapes", "pack_latent", "unpack_latent"]


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


def latent_shapes(geometry: LatentGeometry) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that ``pack_latent`` makes of a layer with latents of its own."""
    g = geometry
    width = g.heads * (g.nope_dim + g.rope_dim)
    return {
        "q_proj.weight": (width, g.hidden),
        "q_proj.bias": (width,),
        "kv_a_proj_with_mqa.weight": (g.rank + g.rope_dim, g.hidden),
        "kv_a_proj_with_mqa.bias": (g.rank + g.rope_dim,),
        "kv_b_proj.weight": (g.heads * (g.nope_dim + g.value_dim), g.rank),
        "o_proj.weight": (g.hidden, g.heads * g.value_dim),
        "o_proj.bias": (g.hidden,),
    }


def unpack_latent(
    tensors: Mapping[str, Tensor],
    geometry: LatentGeometry,
    prefix: str,
    *,
    planes: tuple[int, ...],
    scale: float,
) -> LatentLayer:
    """The latent layer of a layer with latents of its own, in float64: undoes ``pack_latent``.

    Args:
        tensors: Those of ``latent_shapes``, by name.
        geometry: Sizes.
        prefix: What the names begin with.
        planes: For each pair of its rotary key the RoPE plane of the source.
        scale: Factor on the scores.
    """
    own = {name: tensors[prefix + name].double() for name in latent_shapes(geometry)}
    down, bias = own["kv_a_proj_with_mqa.weight"], own["kv_a_proj_with_mqa.bias"]
    return latent_layer(
        geometry,
        q=own["q_proj.weight"],
        q_bias=own["q_proj.bias"],
        latent=down[: geometry.rank],
        latent_shift=bias[: geometry.rank],
        k_rope=down[geometry.rank :],
        k_rope_bias=bias[geometry.rank :],
        up=own["kv_b_proj.weight"],
        o=own["o_proj.weight"],
        o_bias=own["o_proj.bias"],
        planes=planes,
        scale=scale,
    )


def latent_layer(
    geometry: LatentGeometry,
    *,
    q: Tensor,
    q_bias: Tensor | None,
    latent: Tensor,
    latent_shift: Tensor,
    k_rope: Tensor,
    k_rope_bias: Tensor | None,
    up: Tensor,
    o: Tensor,
    o_bias: Tensor | None,
    planes: tuple[int, ...],
    scale: float,
) -> LatentLayer:
    """A latent layer of stacked heads and of a latent with a constant part.

    The constant part adds the same to the keys of all tokens, which no softmax sees (without a
    soft cap), and a constant to the values, whose weights sum to one: an output bias.

    Args:
        geometry: Sizes.
        q: [H * (Dn + Dr), E].
        q_bias: [H * (Dn + Dr)].
        latent: [R, E].
        latent_shift: [R'], R' >= R: the constant part; dims from R on have no other.
        k_rope: [Dr, E].
        k_rope_bias: [Dr].
        up: [H * (Dn + Dv), R'], of each head the NoPE rows of its key first.
        o: [E, H * Dv].
        o_bias: [E].
        planes: Plane of each rotary pair.
        scale: Factor on the scores.
    """
    heads = geometry.heads
    outputs = o.view(len(o), heads, -1)
    stacked = up.view(heads, -1, up.shape[1])
    k_up, v_up = stacked[:, : geometry.nope_dim], stacked[:, geometry.nope_dim :]
    constant = torch.einsum("ehv,hv->e", outputs, v_up @ latent_shift)
    return LatentLayer(
        geometry=geometry,
        q=q.view(heads, -1, q.shape[1]),
        latent=latent,
        k_rope=k_rope,
        k_up=k_up[..., : geometry.rank],
        v_up=v_up[..., : geometry.rank],
        o=outputs,
        q_bias=None if q_bias is None else q_bias.view(heads, -1),
        k_rope_bias=k_rope_bias,
        o_bias=constant if o_bias is None else o_bias + constant,
        planes=planes,
        scale=scale,
    )


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

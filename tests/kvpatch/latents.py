"""Tiny latent models of every family, equal to stock models by construction.

A layer becomes latent without loss (``embedded``, and one dim after the other where queries and
keys have a norm); then its latent is mixed and widened, and the pairs of its rotary key are put in
another order, so that the layers of a model differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint.reader import read_json
from convert.facts import ModelFacts, read_facts
from convert.families import pack, tensor_names, unpack
from convert.families.naming import canonical_names
from convert.layer import AttentionLayer, LatentGeometry, LatentLayer, QkNorm, Rope
from convert.methods.latent import embedded
from convert.planes import planes_of
from convert.targets.latent import latent_class
from convert.targets.target import Target
from tests.families import tiny
from tests.families.stock import load
from tests.kvpatch.stacks import MODELS

__all__ = ["CLAMPED", "EACH", "ELIGIBLE", "NORMED", "SHIFTED", "latent_model", "write_latent"]

_ALWAYS_NORMED = {"qwen3", "gemma3_text", "olmo2", "olmo3"}

NORMED = tuple(
    name
    for name in MODELS
    if tiny.family(name) in _ALWAYS_NORMED or ":norm" in name or name == "persimmon"
)
# a norm of keys with a bias
SHIFTED = tuple(name for name in NORMED if tiny.family(name) in {"phi", "persimmon"})
CLAMPED = ("olmo:bias-clip", "mpt:clip-scale")
ELIGIBLE = tuple(name for name in MODELS if name not in {*SHIFTED, *CLAMPED})

# one model per family, and the norms that not all of its models have
_MORE = ("persimmon:nonorm", "stablelm:norm-bias", "cohere:norm-bias-untied")
EACH = tuple(name for name in ELIGIBLE if ":" not in name or name in _MORE)

# what the converter refuses for reasons other than the attention, and reads as something near it
_READ_AS = {
    "opt:postnorm-nobias": {"do_layer_norm_before": True, "word_embed_proj_dim": 64},
    "bloom:postnorm": {"apply_residual_connection_post_layernorm": False},
    "falcon:rope-parallel": {"alibi": True, "parallel_attn": False},
}


def write_latent(
    name: str, source: Path, folder: Path, sources: Sequence[int] | None = None
) -> Target:
    """Write the latent form of a stock checkpoint, in float64.

    Args:
        name: Of the model in ``MODELS``.
        source: Its folder.
        folder: Of the result.
        sources: For each layer the one whose keys and values it reads; None if all have their own.

    Returns:
        The target that wrote it.
    """
    config = read_json(source / "config.json")
    stored = load_file(source / "model.safetensors")
    facts = read_facts({**config, **_READ_AS.get(name, {})})
    names = canonical_names(stored, facts.family)
    tensors = {names[key]: tensor.double() for key, tensor in stored.items()}
    if name == "falcon:rope-parallel":
        rope = Rope(dim=facts.geometry.head_dim, interleaved=False, theta=10000.0)
        facts = dataclasses.replace(facts, ropes=(rope,) * facts.layers)
    own = [_taken(tensors, facts, layer) for layer in range(facts.layers)]
    read = list(range(facts.layers)) if sources is None else list(sources)
    layers = [_latent(own, facts, layer, read[layer]) for layer in range(facts.layers)]
    target = latent_class(
        facts,
        ranks=[layer.geometry.rank for layer in layers],
        planes=[layer.planes for layer in layers],
        nope_dim=max(layer.geometry.nope_dim for layer in layers),
        value_dim=facts.geometry.value_dim,
        kv_source_layers=sources,
    )
    assert target is not None
    result: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        prefix = target.family.layer_prefix.format(layer=index)
        packed, written = target.fold(layer, {})
        if packed is not None:
            result |= pack(packed, target.family, index)
        result |= {prefix + key: tensor for key, tensor in written.items()}
    for key, tensor in tensors.items():
        result |= {rewrite.name: tensor for rewrite in target.rewrites(key)}
    folder.mkdir()
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(target.edit(config)))
    return target


def latent_model(name: str, stock: Any, folder: Path, sources: Sequence[int] | None = None) -> Any:
    """The latent form of a stock model in memory, in float64 and through two folders."""
    stock.save_pretrained(folder / "source")
    write_latent(name, folder / "source", folder / "latent", sources)
    return load(folder / "latent")


def _taken(tensors: dict[str, Tensor], facts: ModelFacts, layer: int) -> dict[str, Tensor]:
    names = tensor_names(facts.family, facts.geometry, layer, [*"qkvo", "q_norm", "k_norm"])
    return {name: tensors.pop(name) for name in names if name in tensors}


def _latent(
    tensors: Sequence[dict[str, Tensor]], facts: ModelFacts, layer: int, source: int
) -> LatentLayer:
    """The latent form of a layer with the keys and values of another."""
    read, reader = (
        unpack(tensors[index], facts.family, facts.geometry, index, rope=facts.ropes[index])
        for index in (source, layer)
    )
    fields = ("k", "v", "k_bias", "v_bias", "k_norm")
    shared = dataclasses.replace(reader, **{field: getattr(read, field) for field in fields})
    norm, scale = facts.qk_norm, facts.scales[layer]
    whole = embedded(shared, scale) if norm is None else _normed(shared, norm, scale)
    mixed = _mixed(whole, more=source, seed=source)
    if source == layer:
        return mixed
    nothing = mixed.latent[:0]
    return dataclasses.replace(
        mixed, latent=nothing, latent_bias=None, k_rope=nothing, k_rope_bias=None, k=None
    )


def _normed(layer: AttentionLayer, norm: QkNorm, scale: float) -> LatentLayer:
    """The same function as a latent layer: every dim of keys and values has one of its own."""
    g, rope, k, v, o = layer.geometry, layer.rope, layer.k, layer.v, layer.o
    assert rope is not None
    assert k is not None
    assert v is not None
    assert o is not None
    assert layer.q is not None
    assert layer.k_norm is not None
    k_bias = torch.zeros_like(k[..., 0]) if layer.k_bias is None else layer.k_bias
    weight = layer.k_norm + 1 if norm.formula == "rms_plus_one" else layer.k_norm
    weight = weight.expand(g.kv_heads, -1)
    keys = torch.cat([k, k_bias[..., None]], -1)
    if norm.formula == "layer":
        keys = keys - keys.mean(1, keepdim=True)
    keys = keys * weight[..., None]
    planes = planes_of(rope, g.head_dim)
    turning = torch.stack([planes.first, planes.second], 1).flatten().tolist()
    rest = planes.rest.tolist()
    rank, width = g.kv_heads * (len(rest) + g.value_dim), g.kv_heads * len(turning)
    latent, k_up = keys.new_zeros(rank, g.hidden + 1), keys.new_zeros(g.heads, g.head_dim, rank)
    v_up = keys.new_zeros(g.heads, g.value_dim, rank)
    q_rope, k_rope = keys.new_zeros(g.heads, width, g.head_dim), keys.new_zeros(width, g.hidden + 1)
    o_bias = torch.zeros_like(o[:, 0, 0]) if layer.o_bias is None else layer.o_bias.clone()
    for head in range(g.heads):
        own = head // g.group
        for place, dim in enumerate(rest):
            row = own * len(rest) + place
            latent[row], k_up[head, dim, row] = keys[own, dim], 1
        for place, dim in enumerate(turning):
            row = own * len(turning) + place
            k_rope[row], q_rope[head, row, dim] = keys[own, dim], 1
        for dim in range(g.value_dim):
            row = g.kv_heads * len(rest) + own * g.value_dim + dim
            latent[row, :-1], v_up[head, dim, row] = v[own, dim], 1
        if layer.v_bias is not None:
            o_bias += o[:, head] @ layer.v_bias[own]
    return LatentLayer(
        geometry=LatentGeometry(
            hidden=g.hidden,
            heads=g.heads,
            rank=rank,
            nope_dim=g.head_dim,
            rope_dim=width,
            value_dim=g.value_dim,
        ),
        q=layer.q,
        latent=latent[:, :-1],
        k_rope=k_rope[:, :-1],
        k_up=k_up,
        v_up=v_up,
        o=o,
        q_bias=layer.q_bias,
        latent_bias=latent[:, -1],
        k_rope_bias=k_rope[:, -1],
        o_bias=o_bias,
        q_rope=q_rope,
        k=k,
        k_bias=layer.k_bias,
        q_norm=layer.q_norm,
        q_norm_bias=layer.q_norm_bias,
        planes=tuple(range(len(turning) // 2)) * g.kv_heads,
        scale=scale,
    )


def _mixed(layer: LatentLayer, *, more: int, seed: int) -> LatentLayer:
    """The same function with a latent of ``more`` dims in another basis, and pairs in any order."""
    geometry = layer.geometry
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(
        geometry.rank + more, geometry.rank, generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(square).Q  # its columns are orthonormal
    order = torch.randperm(len(layer.planes), generator=generator)
    rotary = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    dims = torch.cat([torch.arange(geometry.nope_dim), geometry.nope_dim + rotary])
    dims = dims if layer.q_rope is None else torch.arange(geometry.nope_dim)
    return dataclasses.replace(
        layer,
        geometry=dataclasses.replace(geometry, rank=geometry.rank + more),
        q=layer.q[:, dims],
        q_bias=None if layer.q_bias is None else layer.q_bias[:, dims],
        latent=basis @ layer.latent,
        k_up=layer.k_up @ basis.T,
        v_up=layer.v_up @ basis.T,
        k_rope=layer.k_rope[rotary],
        k_rope_bias=None if layer.k_rope_bias is None else layer.k_rope_bias[rotary],
        latent_bias=None if layer.latent_bias is None else basis @ layer.latent_bias,
        q_rope=None if layer.q_rope is None else layer.q_rope[:, rotary],
        planes=tuple(layer.planes[int(pair)] for pair in order),
    )

"""Tiny latent models of every family, equal to stock models by construction.

A layer becomes latent without loss (``embedded``); then its latent is mixed and widened, and the
pairs of its rotary key are put in another order, so that the layers of a model differ.
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
from convert.facts import ModelFacts, read_facts, with_stored_names
from convert.families import tensor_names, unpack
from convert.layer import LatentLayer, Rope
from convert.methods.latent import embedded
from convert.targets.latent import latent_class
from convert.targets.target import Target
from tests.families import tiny
from tests.families.stock import load
from tests.kvpatch.stacks import MODELS

__all__ = ["CLAMPED", "EACH", "ELIGIBLE", "NORMED", "latent_model", "write_latent"]

_ALWAYS_NORMED = {"qwen3", "gemma3_text", "olmo2", "olmo3"}

NORMED = tuple(
    name
    for name in MODELS
    if tiny.family(name) in _ALWAYS_NORMED or ":norm" in name or name == "persimmon"
)
CLAMPED = ("olmo:bias-clip", "mpt:clip-scale")
ELIGIBLE = tuple(name for name in MODELS if name not in {*NORMED, *CLAMPED})

# one model per family
EACH = tuple(name for name in ELIGIBLE if ":" not in name or name == "persimmon:nonorm")

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
    tensors = {key: t.double() for key, t in load_file(source / "model.safetensors").items()}
    facts = with_stored_names(read_facts({**config, **_READ_AS.get(name, {})}), tensors)
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
        assert packed is None
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
    names = tensor_names(facts.family, facts.geometry, layer, "qkvo")
    return {name: tensors.pop(name) for name in names if name in tensors}


def _latent(
    tensors: Sequence[dict[str, Tensor]], facts: ModelFacts, layer: int, source: int
) -> LatentLayer:
    """The latent form of a layer with the keys and values of another."""
    read, reader = (
        unpack(tensors[index], facts.family, facts.geometry, index, rope=facts.ropes[index])
        for index in (source, layer)
    )
    shared = {field: getattr(read, field) for field in ("k", "v", "k_bias", "v_bias")}
    whole = embedded(dataclasses.replace(reader, **shared), facts.scales[layer])
    mixed = _mixed(whole, more=source, seed=source)
    if source == layer:
        return mixed
    nothing = mixed.latent[:0]
    return dataclasses.replace(mixed, latent=nothing, k_rope=nothing, k_rope_bias=None)


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
        planes=tuple(layer.planes[int(pair)] for pair in order),
    )

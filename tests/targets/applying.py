"""A conversion written for a target, in memory: what the engine does tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint.reader import read_json
from convert.facts import ModelFacts, check_shapes, read_facts
from convert.families import pack, tensor_names, unpack
from convert.families.naming import canonical_names, is_buffer
from convert.layer import AttentionLayer, LatentLayer
from convert.targets import Target

__all__ = ["MEAN_READS", "apply", "facts_of", "merged", "write"]

MEAN_READS = frozenset({"k", "v", "k_norm"})  # canonical fields that averaging heads needs


def facts_of(folder: Path) -> tuple[ModelFacts, dict[str, Tensor]]:
    """Facts and tensors of a checkpoint, checked against each other."""
    facts = read_facts(read_json(folder / "config.json"))
    stored = load_file(folder / "model.safetensors")
    names = canonical_names(stored, facts.family)
    tensors = {
        names[name]: tensor
        for name, tensor in stored.items()
        if not is_buffer(names[name], facts.family)
    }
    check_shapes(facts, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return facts, tensors


def apply(
    tensors: Mapping[str, Tensor],
    facts: ModelFacts,
    target: Target,
    convert: Callable[[AttentionLayer], AttentionLayer | LatentLayer],
    *,
    reads: frozenset[str] = MEAN_READS,
) -> dict[str, Tensor]:
    """All tensors of the result; a layer sees those that it may, and any other one is alone.

    Args:
        tensors: Those of the source.
        facts: Its attention.
        target: What is written.
        convert: What becomes of a layer.
        reads: Canonical fields that ``convert`` needs.
    """
    result = {
        constant.name: torch.full(constant.shape, constant.value, dtype=torch.float64)
        for constant in target.constants
    }
    left = dict(tensors)
    for layer in range(facts.layers):
        prefix = facts.family.layer_prefix.format(layer=layer)
        names = tensor_names(facts.family, facts.geometry, layer, reads | target.reads)
        own = {name: left.pop(name) for name in names if name in left}
        others = {n: left.pop(prefix + n) for n in target.folds if prefix + n in left}
        before = unpack(own, facts.family, facts.geometry, layer, rope=facts.ropes[layer])
        after, folded = target.fold(convert(before), others)
        written = {} if after is None else pack(after, target.family, layer)
        prefix = target.family.layer_prefix.format(layer=layer)
        written |= {prefix + name: tensor for name, tensor in folded.items()}
        assert not written.keys() & result.keys()
        result |= written
    for name, tensor in left.items():
        for rewrite in target.rewrites(name):
            assert rewrite.name not in result
            transformed = tensor if rewrite.transform is None else rewrite.transform(tensor)
            result[rewrite.name] = transformed.to(tensor.dtype).clone(
                memory_format=torch.contiguous_format
            )
    return result


def merged(layer: AttentionLayer, kv_heads: int) -> AttentionLayer:
    """A layer with the mean of each group of adjacent KV heads."""
    geometry = dataclasses.replace(layer.geometry, kv_heads=kv_heads)
    fields = {name: getattr(layer, name) for name in ("k", "v", "k_bias", "v_bias", "k_norm")}
    if layer.k_norm is not None and layer.k_norm.dim() == 1:  # one norm serves all heads
        del fields["k_norm"]
    means = {
        name: heads.double().unflatten(0, (kv_heads, -1)).mean(1).to(heads.dtype)
        for name, heads in fields.items()
        if heads is not None
    }
    return dataclasses.replace(layer, geometry=geometry, **means)


def write(source: Path, folder: Path, target: Target, *, kv_heads: int) -> Path:
    """Merge the KV heads of a checkpoint to ``kv_heads`` and write it for ``target``, in float64.

    So nothing is rounded on the way.
    """
    facts, stored = facts_of(source)
    tensors = {name: tensor.double() for name, tensor in stored.items()}
    result = apply(tensors, facts, target, lambda layer: merged(layer, kv_heads))
    folder.mkdir()
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    config = target.edit(read_json(source / "config.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder

"""Disk tensors <-> canonical form, driven by the family table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.families.family import Family, Projection
from convert.layer import AttentionLayer, Geometry, Rope

__all__ = ["pack", "tensor_names", "unpack"]


def tensor_names(
    family: Family, geometry: Geometry, layer: int, parts: Iterable[str]
) -> tuple[str, ...]:
    """Disk names of all tensors that hold one of ``parts``, whether the checkpoint has them or not.

    Args:
        family: The row of the table.
        geometry: Sizes of the layer; they count the per-head norms.
        layer: Decoder layer.
        parts: Canonical fields: ``q``, ``k``, ``v``, ``o``, ``q_norm``, ``k_norm``, each with
            its bias.
    """
    wanted = frozenset(parts)
    prefix = family.layer_prefix.format(layer=layer)
    names = []
    for projection in family.projections:
        if wanted & set(projection.parts):
            names += [f"{prefix}{projection.name}.weight", f"{prefix}{projection.name}.bias"]
    for norm in _norms(family, geometry):
        if norm.field.removesuffix("_bias") in wanted:
            names += [prefix + name for name in norm.names]
    return tuple(names)


def unpack(
    tensors: Mapping[str, Tensor],
    family: Family,
    geometry: Geometry,
    layer: int,
    *,
    rope: Rope | None = None,
) -> AttentionLayer:
    """Canonical form of one layer from whichever of its disk tensors are given, as views.

    Args:
        tensors: Disk tensors by name; what is missing stays None in the result.
        family: The row of the table.
        geometry: Sizes of the layer as it lies on disk.
        layer: Decoder layer.
        rope: Its rotary positions, for methods that need them.
    """
    prefix = family.layer_prefix.format(layer=layer)
    fields: dict[str, Any] = {}
    for projection in family.projections:
        name = f"{prefix}{projection.name}"
        if (weight := tensors.get(f"{name}.weight")) is not None:
            fields |= _split(projection, geometry, weight, "")
        if (bias := tensors.get(f"{name}.bias")) is not None:
            fields |= _split(projection, geometry, bias, "_bias")
    for norm in _norms(family, geometry):
        found = [tensors[prefix + name] for name in norm.names if prefix + name in tensors]
        if found:
            whole = torch.stack(found) if len(norm.names) > 1 else found[0]
            fields[norm.field] = whole.reshape(norm.shape)
    return AttentionLayer(geometry=geometry, rope=rope, **fields)


def pack(attention: AttentionLayer, family: Family, layer: int) -> dict[str, Tensor]:
    """Disk tensors of all fields that are present: the inverse of ``unpack``.

    Returns:
        Contiguous tensors by disk name, in the dtype of the fields.
    """
    prefix = family.layer_prefix.format(layer=layer)
    tensors: dict[str, Tensor] = {}
    for projection in family.projections:
        for suffix, ending in (("", ".weight"), ("_bias", ".bias")):
            blocks = [getattr(attention, f"{part}{suffix}") for part in projection.parts]
            if all(block is not None for block in blocks):
                joined = _join(projection, attention.geometry, blocks, bias=bool(suffix))
                tensors[f"{prefix}{projection.name}{ending}"] = joined
    for norm in _norms(family, attention.geometry):
        weight: Tensor | None = getattr(attention, norm.field)
        if weight is not None:
            each = weight if len(norm.names) > 1 else [weight]
            for name, part in zip(norm.names, each, strict=True):
                tensors[prefix + name] = part.reshape(norm.stored).clone()
    return tensors


def _split(
    projection: Projection, geometry: Geometry, tensor: Tensor, suffix: str
) -> dict[str, Tensor]:
    rows = tensor.T if projection.transposed and not suffix else tensor
    if projection.parts == ("o",):
        shape = (-1, geometry.heads, geometry.value_dim)
        return {f"o{suffix}": rows if suffix else rows.reshape(shape)}
    count, rest = projection.block_count(geometry), rows.shape[1:]
    blocks = rows.reshape(count, -1, *rest)
    fields, row = {}, 0
    for part, heads, dim in projection.spans(geometry):
        held = blocks[:, row : row + heads * dim // count]
        fields[part + suffix] = held.reshape(count, -1, dim, *rest).flatten(0, 1)
        row += held.shape[1]
    return fields


def _join(
    projection: Projection, geometry: Geometry, blocks: list[Tensor], *, bias: bool
) -> Tensor:
    if projection.parts == ("o",):
        rows = blocks[0] if bias else blocks[0].flatten(1)
    else:
        count, rest = projection.block_count(geometry), blocks[0].shape[2:]
        each = [block.reshape(count, -1, *rest) for block in blocks]
        rows = (torch.cat(each, 1) if len(each) > 1 else each[0]).flatten(0, 1)
    return (rows.T if projection.transposed and not bias else rows).contiguous()


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm weight or bias.

    Args:
        field: Canonical field.
        shape: Its shape there.
        names: Disk names inside a layer: one, or one for each head.
        stored: Shape of each of them.
    """

    field: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stored: tuple[int, ...]


def _norms(family: Family, geometry: Geometry) -> Iterator[_Norm]:
    norm, dim = family.qk_norm, geometry.head_dim
    if norm is None:
        return
    for field, template, heads in (
        ("q_norm", family.q_norm, geometry.heads),
        ("k_norm", family.k_norm, geometry.kv_heads),
    ):
        each = "{head}" in template
        names = tuple(template.format(head=head) for head in range(heads if each else 1))
        shape = (dim,) if norm.layout == "shared" else (heads, dim)
        stored = (dim,) if each else (heads * dim,) if norm.layout == "full" else shape
        yield _Norm(field, shape, names, stored)
        if norm.formula == "layer":  # an RMS norm has no bias
            biases = tuple(name.removesuffix("weight") + "bias" for name in names)
            yield _Norm(f"{field}_bias", shape, biases, stored)

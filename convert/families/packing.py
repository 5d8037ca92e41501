"""Disk tensors <-> canonical form, driven by the family table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        parts: Canonical fields: ``q``, ``k``, ``v``, ``o`` (with their biases), ``q_norm``,
            ``k_norm``.
    """
    wanted = frozenset(parts)
    prefix = family.layer_prefix.format(layer=layer)
    names = []
    for projection in family.projections:
        if wanted & set(projection.parts):
            names += [f"{prefix}{projection.name}.weight", f"{prefix}{projection.name}.bias"]
    for field, heads in (("q_norm", geometry.heads), ("k_norm", geometry.kv_heads)):
        if family.qk_norm is not None and field in wanted:
            names += _norm_names(prefix + getattr(family, field), heads)
    return tuple(names)


def unpack(
    tensors: Mapping[str, Tensor],
    family: Family,
    geometry: Geometry,
    layer: int,
    *,
    rope: Rope | None = None,
) -> AttentionLayer:
    """Canonical form of one layer from whichever of its disk tensors are given (views, no copy).

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
    if family.qk_norm is not None:
        for field, heads, dim in (
            ("q_norm", geometry.heads, geometry.head_dim),
            ("k_norm", geometry.kv_heads, geometry.head_dim),
        ):
            names = _norm_names(prefix + getattr(family, field), heads)
            found = [tensors[name] for name in names if name in tensors]
            if found:
                whole = torch.stack(found) if len(names) > 1 else found[0]
                shared = family.qk_norm.layout == "shared"
                fields[field] = whole if shared else whole.reshape(heads, dim)
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
                joined = _join(projection, blocks, bias=bool(suffix))
                tensors[f"{prefix}{projection.name}{ending}"] = joined
    if family.qk_norm is not None:
        for field in ("q_norm", "k_norm"):
            weight: Tensor | None = getattr(attention, field)
            if weight is not None:
                name = prefix + getattr(family, field)
                tensors |= _norm_tensors(name, weight, family.qk_norm.layout == "full")
    return tensors


def _split(
    projection: Projection, geometry: Geometry, tensor: Tensor, suffix: str
) -> dict[str, Tensor]:
    if projection.parts == ("o",):
        heads, dim = geometry.heads, geometry.value_dim
        return {f"o{suffix}": tensor if suffix else tensor.reshape(-1, heads, dim)}
    fields, row = {}, 0
    for part, heads, dim in projection.spans(geometry):
        fields[part + suffix] = tensor[row : row + heads * dim].reshape(
            heads, dim, *tensor.shape[1:]
        )
        row += heads * dim
    return fields


def _join(projection: Projection, blocks: list[Tensor], *, bias: bool) -> Tensor:
    if projection.parts == ("o",):
        return blocks[0].contiguous() if bias else blocks[0].flatten(1).contiguous()
    if len(blocks) == 1:
        return blocks[0].flatten(0, 1).contiguous()
    return torch.cat([block.flatten(0, 1) for block in blocks])


def _norm_names(template: str, heads: int) -> list[str]:
    if "{head}" not in template:
        return [template]
    return [template.format(head=head) for head in range(heads)]


def _norm_tensors(template: str, weight: Tensor, full: bool) -> dict[str, Tensor]:
    if "{head}" in template:
        return {template.format(head=head): row.clone() for head, row in enumerate(weight)}
    return {template: (weight.flatten() if full else weight).contiguous()}

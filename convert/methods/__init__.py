"""Conversion methods: pure functions on the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convert.layer import AttentionLayer

if TYPE_CHECKING:
    from convert.methods.merge import Inputs

__all__ = ["Converted", "Method", "Outline"]

# the layers of a unit, AttentionLayers or LatentLayers, and of each what the step lost, by name
Converted = tuple[Sequence[Any], Sequence[Mapping[str, Any]]]
Outline = Callable[[Sequence[AttentionLayer]], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One conversion, as the engine sees it.

    It works on units: adjacent layers that share the keys and values of the first of them. Where
    nothing is shared, a unit is one layer.

    Args:
        reads: Canonical fields it needs; all other tensors pass through as bytes.
        outline: A unit of the shapes and dtypes that ``convert`` gives, for the plan; sees
            zeros, and must be cheap.
        outlines: The same by the first layer of a unit, for units that become something else.
        convert: The unit's new form, from the unit and the second moments of its inputs, which
            are None where nothing was calibrated. None where it takes more than the unit itself,
            and a ``Converting`` or the like makes it.
        tensors: Further tensors of a layer that it takes, by their names inside the layer; for
            layers that no row of the family table describes.
        working_bytes: Memory that ``convert`` takes beside the unit before and after, from the
            bytes of the unit's largest tensor.
    """

    reads: frozenset[str]
    outline: Outline
    convert: Callable[[Sequence[AttentionLayer], Inputs | None], Converted] | None
    working_bytes: Callable[[int], int]
    outlines: Mapping[int, Outline] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()

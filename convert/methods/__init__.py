"""Conversion methods: pure functions on the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from convert.layer import AttentionLayer

__all__ = ["Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One conversion, as the engine sees it.

    Args:
        reads: Canonical fields it needs; all other tensors pass through as bytes.
        convert: The layer's new form. Runs on zeros too, which gives the plan its shapes.
        measure: What the step lost, by name, from the layer before and after.
    """

    reads: frozenset[str]
    convert: Callable[[AttentionLayer], AttentionLayer]
    measure: Callable[[AttentionLayer, AttentionLayer], Mapping[str, float]]

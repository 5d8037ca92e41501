"""Conversion methods: pure functions on the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.layer import AttentionLayer

__all__ = ["Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One conversion, as the engine sees it.

    Args:
        reads: Canonical fields it needs; all other tensors pass through as bytes.
        outline: A layer of the shapes and dtypes that ``convert`` gives, for the plan; sees
            zeros, and must be cheap.
        convert: The layer's new form, and what the step lost, by name.
        working_bytes: Memory that ``convert`` takes beside the layer before and after, from the
            bytes of the layer's largest tensor.
    """

    reads: frozenset[str]
    outline: Callable[[AttentionLayer], AttentionLayer]
    convert: Callable[[AttentionLayer], tuple[AttentionLayer, Mapping[str, Any]]]
    working_bytes: Callable[[int], int]

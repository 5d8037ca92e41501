"""Rows of the classes of kvpatch: the stock family with four plain projections."""

from __future__ import annotations

import dataclasses

from convert.families.family import Family, Projection
from kvpatch.models import PREFIX, class_names

__all__ = ["separate"]


def separate(source: Family) -> Family:
    """The row of the kvpatch class of a family.

    Raises:
        UsageError: If kvpatch has none.
    """
    return dataclasses.replace(
        source,
        model_type=PREFIX + source.model_type,
        architecture=class_names(source.model_type)["AutoModelForCausalLM"],
        gqa=True,
        tabled=source.tabled and source.positions != "rope",  # rotations are computed
        projections=tuple(
            Projection(f"{source.attention}.{part}_proj", (part,)) for part in ("q", "k", "v", "o")
        ),
    )

"""All stock attention classes that ours take the place of, and how they do.

Only the class of an instance changes: weights, cache and other models stay as they are, and
nothing of it is saved with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from torch import nn

from kvpatch.attention import bypassing, latent
from kvpatch.attention.stock import StockClass, Swapped

__all__ = ["STOCK", "stock_class", "swapped_class"]

STOCK: tuple[StockClass, ...] = (*latent.STOCK, *bypassing.STOCK)

_BY_CLASS: Mapping[tuple[str, str], StockClass] = {(row.module, row.name): row for row in STOCK}
_PREFIX = "Fused"


def stock_class(kind: type[nn.Module]) -> StockClass | None:
    """The row of a class, or None: a subclass of one in ``STOCK`` may compute something else."""
    return _BY_CLASS.get((kind.__module__, kind.__qualname__))


@cache
def swapped_class(row: StockClass) -> type[Swapped]:
    """Our class for the instances of a stock one.

    It is a subclass, so that whoever looks for attention modules of the stock class finds it.
    """
    stock: type[nn.Module] = getattr(import_module(row.module), row.name)
    members = {"__module__": __name__, "row": row, "stock": stock}
    return type(f"{_PREFIX}{row.name}", (row.own, stock), members)


def __getattr__(name: str) -> type[Swapped]:
    """Find the class of a pickled module, which may not be made yet in this process."""
    for row in STOCK:
        if name == f"{_PREFIX}{row.name}":
            return swapped_class(row)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Attention classes of transformers that ours take the place of, one instance at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

__all__ = ["StockClass", "Swapped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StockClass:
    """A stock attention class.

    Args:
        model_type: Of the models that have it.
        name: Of the class.
        own: What our class adds to it.
    """

    model_type: str
    name: str
    own: type[Swapped]

    @property
    def module(self) -> str:
        """Name of the module that defines the class."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


class Swapped(nn.Module):
    """What our classes have in common, mixed in before a stock class.

    Attributes:
        row: Of the stock class.
        stock: The class itself.
    """

    row: ClassVar[Any]
    stock: ClassVar[type[nn.Module]]

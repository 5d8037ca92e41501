"""Model families as data: how each model_type names and packs its attention on disk.

To add a family, add one row to ``convert/families/table.py``; the tests that run over the whole
table then check it against the stock transformers class.
"""

from convert.families.family import Family, Only, Projection, Windows
from convert.families.packing import pack, tensor_names, unpack
from convert.families.table import FAMILIES, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "Only",
    "Projection",
    "Windows",
    "family_of",
    "pack",
    "tensor_names",
    "unpack",
]

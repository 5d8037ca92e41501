"""Sizes and budgets as people write them."""

from __future__ import annotations

import re
from math import isfinite

__all__ = ["parse_budget", "parse_size"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500 MB`` or ``2GiB``.

    Raises:
        ValueError: If the text is not a positive number and a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size such as 5GB or 500MB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not isfinite(size):
        raise ValueError(f"{text[:20]}... is too large a size")
    return int(size)


def parse_budget(text: str) -> float | tuple[int, int]:
    """A share between 0 and 1 of ``25%``, or rank and rotary dims of ``512+64``.

    Raises:
        ValueError: If the text is neither.
    """
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    split = re.fullmatch(r"(\d+)\+(\d+)", text)
    if share is not None and 0 < float(share[1]) <= 100:
        return float(share[1]) / 100
    if split is not None and int(split[1]) and not int(split[2]) % 2:
        return int(split[1]), int(split[2])
    raise ValueError(
        f"kv_budget {text!r} is neither a share such as 25% nor a rank and an even number of "
        "rotary dims such as 512+64"
    )

"""The tiny models of every family, as the family tests have them."""

from __future__ import annotations

from tests.families.conftest import checkpoint

__all__ = ["checkpoint"]

"""Fixtures of more than one file."""

from __future__ import annotations

import pytest

from convert.methods import merge


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are then the plain least squares fit, and what they lose is exact."""
    monkeypatch.setattr(merge, "_RIDGE", 0.0)

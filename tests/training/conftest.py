"""One place for the checkpoints of all tests of uptraining."""

from __future__ import annotations

import pytest

from tests.training.small import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Tiny checkpoints and texts."""
    return Place(tmp_path_factory.mktemp("training"))

"""Bases of all cases, made once in each process."""

from __future__ import annotations

import pytest

from tests.fuzz.bases import Bases, make_bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("fuzz-bases"))

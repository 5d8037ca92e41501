"""A small source, and what an undisturbed conversion of it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.running import cli, contents, gqa
from tests.faults.small_llama import write_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("faults") / "source")


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Path:
    out = source.parent / "undisturbed"
    assert cli(gqa(source, out)).code == 0
    return out


@pytest.fixture(scope="module")
def expected(undisturbed: Path) -> dict[str, bytes | str | None]:
    return contents(undisturbed)

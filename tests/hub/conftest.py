"""A converted checkpoint, a Hub without it, and a client of that Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.hub_client import Client
from tests.faults.hub_server import serve
from tests.faults.running import cli, gqa
from tests.faults.small_llama import write_llama
from tests.hub.writable import WritableHub, empty_hub

REPOSITORY = "someone/small-llama-gqa2"


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of several weight files, with a side file in a folder. Not to be changed."""
    root = tmp_path_factory.mktemp("pushed")
    source = write_llama(root / "source", layers=2, hidden=32)
    run = cli(gqa(source, root / "out"))
    assert run.code == 0, run.err
    return root / "out"


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with serve(empty_hub(REPOSITORY)) as served:
        yield served


@pytest.fixture
def client(hub: WritableHub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")

"""Settings and fixtures for all tests: no network, one thread, tiny models of every family."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from convert.checkpoint.reader import Checkpoint
from tests.kernels.interpreter import import_triton

torch.set_num_threads(1)
import_triton()  # before something else imports it, which would define its functions for a GPU

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real checkpoints and texts that lie beside the project, where they are at hand."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real checkpoints are not at hand ({REAL_DATA.name} is missing)")
    return REAL_DATA


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes whatever reads a weight a bug, which ends with exit code 1."""

    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    for name in ("read", "chunks", "sha256"):
        monkeypatch.setattr(Checkpoint, name, read)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The bundled small Llama checkpoint."""
    return Path(__file__).parents[1] / "convert" / "assets" / "demo-model"

"""Folders of tiny models, each made once: the stock model, and its conversions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from convert import convert, make_recipe
from tests.families.stock import Checkpoints, Conversions, make
from tests.families.tiny import settings


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Folder of a model in ``MODELS``, by name."""

    @cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.replace(":", "-"))
        make(name, settings(name)).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """Folder of the conversion of a folder, by KV heads and merge."""

    @cache
    def result(source: Path, kv_heads: int, merge: str = "mean") -> Path:
        folder = tmp_path_factory.mktemp(f"{source.name}-{kv_heads}-{merge}") / "out"
        recipe = {"method": "gqa", "kv_heads": kv_heads, "merge": merge}
        return convert(make_recipe({**recipe, "source": str(source), "output": str(folder)}))

    return result

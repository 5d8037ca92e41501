"""Fixtures for the tests of the recipes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.families.texts import random_text, write_tokenizer
from tests.recipes.dry_runs import Hollow
from tests.recipes.shapes import PUBLISHED, write_headers_only


@pytest.fixture(scope="package")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Hollow:
    """Header-only checkpoint of every published model, by repository, and a text to calibrate on.

    The tokenizer is not the model's: what a plan says depends on the number of tokens alone.
    """
    text = random_text(60_000, seed=0)
    folders = {}
    for repository, model in PUBLISHED.items():
        folders[repository] = write_headers_only(model, tmp_path_factory.mktemp("hollow"))
        write_tokenizer(folders[repository])
        (folders[repository] / "text.txt").write_text(text)
    return folders


@pytest.fixture(autouse=True, scope="package")
def two_cores() -> Iterator[None]:
    """What calibration does side by side takes memory; the recipes say what it is on two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        yield

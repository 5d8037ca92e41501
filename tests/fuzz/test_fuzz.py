"""Sources, recipes and texts with something wrong: refused in words, or converted soundly.

``FUZZ_SEED=17`` runs that case alone, ``FUZZ=5000`` so many others than usual.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.bases import BASES, WAYS, Bases
from tests.fuzz.cases import Case, draw, laid_out
from tests.fuzz.oracle import Oracle


def _seeds() -> range:
    if one := os.environ.get("FUZZ_SEED"):
        return range(int(one), int(one) + 1)
    if many := os.environ.get("FUZZ"):
        return range(1_000_000, 1_000_000 + int(many))
    return range(500)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", _seeds())
def test_case(
    seed: int,
    bases: Bases,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    case = draw(seed)
    draft, done = laid_out(case, bases, tmp_path)
    monkeypatch.chdir(tmp_path)
    found = Oracle(draft, tmp_path, lambda: capfd.readouterr().out).check()
    what = f"FUZZ_SEED={seed}: {case.base}, {case.way}: {'; '.join(done)}"
    if found:
        pytest.fail("\n".join([what, *found]), pytrace=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_sound_case(
    base: str,
    way: str,
    bases: Bases,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nothing is wrong with what cases start from."""
    draft, _ = laid_out(Case(0, base, way, (), False), bases, tmp_path)
    monkeypatch.chdir(tmp_path)
    oracle = Oracle(draft, tmp_path, lambda: capfd.readouterr().out)
    assert oracle.check() == []

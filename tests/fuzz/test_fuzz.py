"""Sources, recipes and texts with something wrong: refused in words, or converted soundly.

``FUZZ_SEED=17`` runs that case alone, ``FUZZ=5000`` so many others than usual, from ``FUZZ_FROM``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.faults.running import cli, peak_memory
from tests.fuzz.bases import BASES, WAYS, Bases
from tests.fuzz.cases import Case, draw, laid_out
from tests.fuzz.oracle import Oracle


def _seeds() -> range:
    if one := os.environ.get("FUZZ_SEED"):
        return range(int(one), int(one) + 1)
    if many := os.environ.get("FUZZ"):
        first = int(os.environ.get("FUZZ_FROM", "1_000_000"))
        return range(first, first + int(many))
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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gqa svd", "mla budget"])
def test_peak_memory_keeps_to_the_plan(way: str, bases: Bases, tmp_path: Path) -> None:
    """In a process of its own, with all that it imports; pooling is measured on larger models."""
    draft, _ = laid_out(Case(0, "llama", way, (), False), bases, tmp_path)
    paths = {key: str(tmp_path / draft.recipe[key]) for key in ("source", "output")}
    text = {"calibration": str(draft.text)} if "calibration" in draft.recipe else {}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**draft.recipe, **paths, **text}))
    plan = cli(["run", str(recipe), "--dry-run", "--json"])
    assert peak_memory(["run", str(recipe)]) < json.loads(plan.out)["peak_ram"]

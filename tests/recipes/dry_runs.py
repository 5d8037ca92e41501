"""The recipes, and what their dry runs on header-only checkpoints say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from convert.cli import app
from convert.recipe_file import load_recipe

__all__ = ["FOLDER", "RECIPES", "Hollow", "dry_run", "held", "run"]

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# header-only checkpoint of every published model, by repository
Hollow = dict[str, Path]


def run(*arguments: str) -> dict[str, Any]:
    """What a command prints with ``--json``."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def dry_run(path: Path, hollow: Hollow) -> dict[str, Any]:
    """The plan of a recipe; one that calibrates does so on the text beside the checkpoint."""
    recipe = load_recipe(path)
    changed = {"source": hollow[recipe.source]}
    if recipe.calibration is not None:
        changed["calibration"] = hollow[recipe.source] / "text.txt"
    sets = [word for key, value in changed.items() for word in ("--set", f"{key}={value}")]
    return run("run", str(path), "--dry-run", *sets)


def held(plan: dict[str, Any]) -> tuple[str, str]:
    """What is cached in a layer, before and after, as the README's table has it."""
    before, after = plan["kv_heads"]
    sources, latent = plan["kv_source_layers"], plan["latent"]
    if latent is not None:
        return f"{before}", f"{latent['rank']} + {latent['rope_dims']}"
    own = len(set(sources))
    return f"{before}", f"{after}" + f" in {own} of {len(sources)} layers" * (own < len(sources))

"""The README of the recipes explains every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from convert.recipe import Recipe
from convert.recipe_file import load_recipe
from kvpatch.errors import UsageError
from tests.recipes.dry_runs import FOLDER

README = (FOLDER / "README.md").read_text()


def readme_keys() -> dict[str, str]:
    """Key and default of every row of the README's last table."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.partition("## Keys")[2], re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a key stands there twice"
    return dict(rows)


_MODELS: tuple[type[Recipe], ...] = get_args(Recipe)
_KEYS = sorted({key for model in _MODELS for key in model.model_fields})


def test_readme_explains_every_key() -> None:
    assert sorted(readme_keys()) == _KEYS


@pytest.mark.parametrize("key", _KEYS)
def test_readme_says_which_methods_have_a_key(key: str) -> None:
    having = [model for model in _MODELS if key in model.model_fields]
    names = [f"`{model.model_fields['method'].default}`" for model in having]
    methods = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    (row,) = re.findall(rf"^\| `{key}` \|.*$", README.partition("## Keys")[2], re.MULTILINE)
    said = re.findall(r"Only for ([^.]+)\.", row)
    assert said == ([] if len(having) == len(_MODELS) else [methods])


@pytest.mark.parametrize("key", _KEYS)
def test_readme_gives_the_default(key: str) -> None:
    defaults = {_default(key, model) for model in _MODELS if key in model.model_fields}
    assert readme_keys()[key] in defaults


def _default(key: str, model: type[Recipe]) -> str:
    field = model.model_fields[key]
    if field.is_required() or key == "method":  # without its method a recipe is refused
        return "required"
    if field.default is None:
        return "the source's" if key == "dtype" else "none"
    value = field.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_method_is_required(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: ./model\nkv_heads: 2\n")
    with pytest.raises(UsageError, match="method must be one of"):
        load_recipe(recipe)

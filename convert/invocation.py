"""Recipes as commands, for hints that can be run as they stand."""

from __future__ import annotations

import shlex

from convert.recipe import Recipe

__all__ = ["command_of"]

_ARGUMENTS = ("method", "source", "output")


def command_of(recipe: Recipe) -> str:
    """The command of a recipe, with a flag for each key that is not at its default."""
    words = ["kvpatch", recipe.method, recipe.source, recipe.output or "OUT"]
    for key, field in type(recipe).model_fields.items():
        value = getattr(recipe, key)
        if key in _ARGUMENTS or value == field.default:
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)

"""Recipes as commands: the command line understands them, and makes the same recipe of them."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from convert.commands.conversion import _recipe
from convert.invocation import command_of
from convert.recipe import make_recipe
from tests.flags import COMMANDS

_RECIPES: list[dict[str, Any]] = [
    {"method": "gqa", "kv_heads": 2, "merge": "svd", "group": "similar"},
    {"method": "mqa", "resume": False, "overwrite": True, "revision": "main"},
    {"method": "cla", "share": 2, "layers": "1:4", "match": False, "max_shard_size": "1GB"},
    {"method": "mla", "kv_budget": "256+64", "serving": True, "dtype": "bfloat16"},
    {
        "method": "mla",
        "rank": 8,
        "rope_dims": 4,
        "calibration": "a text.txt",
        "refit": "o",
        "rope_select": "per-frequency",
        "target": "kvpatch",
    },
    {"method": "export", "target": "native", "arch": "youtu", "allow_nonfinite": True},
]


@pytest.mark.parametrize("keys", _RECIPES, ids=lambda keys: keys["method"])
def test_a_command_makes_its_recipe(keys: dict[str, Any]) -> None:
    recipe = make_recipe({"source": "./some $model", "output": "out", **keys})
    program, method, *words = shlex.split(command_of(recipe))
    assert (program, method) == ("kvpatch", keys["method"])
    context = COMMANDS[method].make_context(method, list(words))  # which it consumes
    assert _recipe(method, context.params) == recipe
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) == len(keys) - 1, "a flag that is not needed"

"""Checkpoint in, checkpoint with a smaller KV cache out.

The public Python API; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "convert": "pipeline",
    "evaluate_checkpoint": "evaluate",
    "inspect_source": "inspection",
    "load_recipe": "recipe_file",
    "make_recipe": "recipe",
    "prepare": "pipeline",
    "push_folder": "hub.push",
    "verify_checkpoint": "verify",
}

__all__ = [
    "convert",
    "evaluate_checkpoint",
    "inspect_source",
    "load_recipe",
    "make_recipe",
    "prepare",
    "push_folder",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"convert.{_HOMES[name]}"), name)

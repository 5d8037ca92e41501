"""Recipes as files: strict YAML, with overrides."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from convert.recipe import Recipe, make_recipe, place, validated
from convert.training.recipe import UptrainRecipe
from kvpatch.errors import UsageError

__all__ = ["MAX_RECIPE_BYTES", "load_recipe"]

MAX_RECIPE_BYTES = 1_000_000


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | UptrainRecipe:
    """Read a YAML recipe and apply ``key=value`` overrides.

    Raises:
        UsageError: If the file is absent, not strict YAML, or not a valid recipe.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_RECIPE_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from error
    if size > MAX_RECIPE_BYTES:
        raise UsageError(f"the recipe {path} has {size:,} bytes; that is no recipe")
    values, lines = _read_yaml(text, path.name)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UsageError(f"--set {override}: expected key=value")
        plain = key in {
            "source",
            "output",
            "revision",
            "calibration",
            "layers",
            "teacher",
            "data",
            "eval_text",
        }  # paths and names are no YAML
        values[key] = value if plain else _read_scalar(value, f"--set {override}")
        lines[key] = 0
    if values.get("method") == "uptrain":
        return validated(UptrainRecipe, values, where=path.name, lines=lines)
    return make_recipe(values, where=path.name, lines=lines)


def _read_scalar(text: str, where: str) -> Any:
    values, _ = _read_yaml(f"value: {text}", where)
    return values["value"]


def _read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        node = yaml.compose(text, Loader=_StrictLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{where}: expected keys and values")
        loader = _StrictLoader("")
        values = loader.construct_mapping(node, deep=True)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise UsageError(f"{place(where, line)}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}") from error
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return {str(key): value for key, value in values.items()}, lines


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML: no duplicate keys, no anchors (which can grow without bound), no tags.

    A range such as 1:6 is text, and not a number of base 60 as in YAML 1.1.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # of PyYAML's class
        first: [
            (tag, re.compile(rf"(?!.*:){pattern.pattern}", pattern.flags))
            for tag, pattern in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed", problem_mark=event.start_mark
            )
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags such as {event.tag} are not allowed", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

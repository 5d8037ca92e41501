"""The converted checkpoints in a project's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.staging import MANIFEST
from convert.console import visible
from kvpatch.errors import InputModelError

__all__ = ["find_outputs"]


def find_outputs(folders: Sequence[Path], warn: Callable[[str], None]) -> list[Path]:
    """The converted checkpoints among these folders, and in those that are none themselves.

    Args:
        folders: As the user named them.
        warn: Called for each checkpoint that was exported, which a report has no place for.

    Raises:
        InputModelError: If a folder neither is nor holds one.
    """
    return [output for folder in folders for output in _outputs(folder, warn)]


def _outputs(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder]
    found = list(_below(folder))
    if not found:
        raise InputModelError(
            f"{folder} has no {MANIFEST}, and no folder in it has; none was made by kvpatch"
        )
    exported = {output for output in found if _is_export(output)}
    for output in found:
        if output in exported:
            warn(
                f"{visible(str(output))} was exported, which loses nothing that a report could "
                "show, and is left out"
            )
    return [output for output in found if output not in exported]


def _below(folder: Path) -> Iterator[Path]:
    """Checkpoints in folders that are not hidden, as those of unfinished runs are; in order."""
    for parent, names, files in os.walk(folder):
        if MANIFEST in files:
            yield Path(parent)
        names[:] = sorted(name for name in names if not name.startswith("."))


def _is_export(folder: Path) -> bool:
    recipe = read_manifest(folder).get("recipe")
    return isinstance(recipe, dict) and recipe.get("method") == "export"

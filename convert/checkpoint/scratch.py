"""Results of calibration on disk, between the run that makes them and the files they go into."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Scratch", "settle"]


class Scratch:
    """Finished results in a folder, one file each; a file is there whole or not at all.

    Args:
        folder: Made when the first result is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether a result is finished, and its file whole."""
        try:
            with safe_open(self._path(name), framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def keep(self, name: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Store the tensors of a result and what there is to say of it."""
        self._folder.mkdir(exist_ok=True)
        path = self._path(name)
        partial = path.with_suffix(".partial")
        save_file(dict(tensors), partial, metadata={"facts": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """What ``keep`` was given for a finished result."""
        with safe_open(self._path(name), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def settle(partial: Path, final: Path) -> None:
    """Make a folder that was written durable, then give it its name, in one step.

    Args:
        partial: The folder; others may have written its files.
        final: Its name from then on; must not exist.
    """
    for path in (*filter(Path.is_file, partial.rglob("*")), partial):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    partial.rename(final)

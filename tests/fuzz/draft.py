"""A case while mutations change it: its source, its recipe and its text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

__all__ = ["Draft", "Mutation", "replaced"]

_INDEX = "model.safetensors.index.json"


@dataclass(slots=True)
class Draft:
    """What a case consists of.

    Args:
        source: Folder of the checkpoint; its files are shared with others, so they are replaced
            and never written to.
        recipe: Keys of the recipe.
        text: The calibration text.
        numbers: Whether it was changed what tensors hold, so that they may overflow or be NaN.
    """

    source: Path
    recipe: dict[str, Any]
    text: Path
    numbers: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The config.json; mutations that damage the file itself come after all that read it."""
        found: dict[str, Any] = json.loads((self.source / "config.json").read_text())
        return found

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write a config.json."""
        replaced(self.source / "config.json", json.dumps(config, indent=2).encode())

    @property
    def files(self) -> list[Path]:
        """The weight files that are sound."""
        return [file for file in sorted(self.source.glob("*.safetensors")) if _is_sound(file)]

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """What a weight file holds, sorted by name."""
        return dict(sorted(load_file(file).items()))

    def store(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a weight file, and what it holds into the index if there is one."""
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        replaced(file, save(whole, metadata={"format": "pt"}))
        if (self.source / _INDEX).exists():
            index = self.index
            elsewhere = {n: f for n, f in index["weight_map"].items() if f != file.name}
            self.reindex({**index, "weight_map": elsewhere | dict.fromkeys(whole, file.name)})

    @property
    def index(self) -> dict[str, Any]:
        """The index; one is made if the checkpoint has none that is sound."""
        path = self.source / _INDEX
        with suppress(OSError, ValueError, KeyError, TypeError):
            found: dict[str, Any] = json.loads(path.read_text())
            return {**found, "weight_map": dict(found["weight_map"])}
        return {"weight_map": {name: f.name for f in self.files for name in self.tensors(f)}}

    def reindex(self, index: object) -> None:
        """Write an index."""
        replaced(self.source / _INDEX, json.dumps(index).encode())


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of a case.

    Args:
        stage: Those that damage files come after those that read them.
        change: Changes the draft, by chance; says what it did.
    """

    stage: int
    change: Callable[[Draft, Random], str]

    def apply(self, draft: Draft, random: Random) -> str:
        """Change the draft, unless nothing is left that could be changed; say what was done."""
        if self.stage and not draft.files:
            return f"({self.name}: no sound file is left)"
        if not (draft.source / "config.json").is_file():
            return f"({self.name}: config.json is gone)"
        return f"{self.name} {self.change(draft, random)}"

    @property
    def name(self) -> str:
        """What the function is called."""
        return self.change.__name__


def _is_sound(file: Path) -> bool:
    if not file.is_file():  # to open a pipe would wait forever
        return False
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def replaced(path: Path, content: bytes) -> None:
    """Put a new file in the place of one that others may share."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)

"""Measured results, recorded in a converted checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.card import render_card
from convert.checkpoint.manifest import read_manifest, rewrite_manifest
from convert.checkpoint.writer import write_file
from kvpatch.errors import UsageError

__all__ = ["save_evaluation", "torch_dtype"]

_CARD = "README.md"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name.

    Raises:
        UsageError: If it is none that a model can run in.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise UsageError(f"--dtype {name}: choose one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def save_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a measurement to ``kvpatch.json`` and to the model card made from it.

    A measurement of the same text, windows and dtype is replaced. The card is written first: if
    the run dies in between, ``verify`` says that the card is not the recorded one.

    Raises:
        InputModelError: If the folder was not made by kvpatch.
    """
    manifest = read_manifest(folder)
    key = ("text_sha256", "context", "stride", "windows", "dtype")
    kept = [
        old for old in manifest["evaluations"] if any(old[name] != evaluation[name] for name in key)
    ]
    manifest["evaluations"] = [*kept, dict(evaluation)]
    card = write_file(folder / _CARD, render_card(manifest))
    rewrite_manifest(folder, manifest, {_CARD: card})

"""Measured results, recorded in a converted checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from convert.card import render_card
from convert.checkpoint.manifest import read_manifest, rewrite_manifest
from convert.checkpoint.writer import write_file
from kvpatch.errors import OutputError, UsageError

__all__ = ["check_saveable", "save_evaluation", "torch_dtype"]

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


def check_saveable(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose card can be written anew.

    Raises:
        InputModelError: If the folder was not made by kvpatch.
        OutputError: If its card was edited; a new one would lose that.
    """
    manifest = read_manifest(folder)
    card = folder / _CARD
    recorded = manifest["files"].get(_CARD, {}).get("sha256")
    if not card.is_file() or sha256(card.read_bytes()).hexdigest() != recorded:
        raise OutputError(
            f"{card} is not the card that kvpatch wrote; --save would replace it",
            hint="Move your changes elsewhere and restore the card, or measure without --save.",
        )
    return manifest


def _identity(evaluation: Mapping[str, Any]) -> tuple[object, ...]:
    keys = ("text_sha256", "context", "stride", "windows", "dtype")
    return (*(evaluation[key] for key in keys), evaluation["against"] is None)


def save_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a measurement to ``kvpatch.json`` and to the model card made from it.

    A measurement of the same text, windows and dtype is replaced. The card is written first: if
    the run dies in between, ``verify`` says that the card is not the recorded one.

    Raises:
        InputModelError: If the folder was not made by kvpatch.
        OutputError: If its card was edited.
        UsageError: If the checkpoint was calibrated or trained on this very text, which flatters
            it.
    """
    manifest = check_saveable(folder)
    calibration = manifest["calibration"]
    if calibration is not None and calibration["text_sha256"] == evaluation["text_sha256"]:
        raise UsageError(
            f"{evaluation['text']} is the text that {folder} was calibrated on; a measurement on "
            "it says too little and is not saved",
            hint="Measure on another text, or without --save.",
        )
    trained = {training["data"]["sha256"] for training in manifest.get("trainings", [])}
    if evaluation["text_sha256"] in trained:
        raise UsageError(
            f"{evaluation['text']} is a text that {folder} was trained on; a measurement on it "
            "says too little and is not saved",
            hint="Measure on another text, or without --save.",
        )
    kept = [old for old in manifest["evaluations"] if _identity(old) != _identity(evaluation)]
    manifest["evaluations"] = [*kept, dict(evaluation)]
    card = write_file(folder / _CARD, render_card(manifest))
    rewrite_manifest(folder, manifest, {_CARD: card})

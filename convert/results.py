"""Measured results, recorded in a converted checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from convert.card import render_card
from convert.checkpoint.manifest import read_manifest, rewrite_manifest
from convert.checkpoint.writer import write_file
from convert.hub.results import eval_results
from convert.texts import Text
from kvpatch.errors import OutputError, UsageError

__all__ = ["check_saveable", "check_text", "save_results", "torch_dtype", "without_results"]

_CARD = "README.md"
_EVAL_RESULTS = ".eval_results"
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


def check_text(folder: Path, text: Text) -> None:
    """Refuse to save what is measured on a text that a checkpoint was calibrated or trained on.

    Raises:
        InputModelError: If the folder was not made by kvpatch.
        UsageError: If it is that text, which flatters the checkpoint.
    """
    manifest = read_manifest(folder)
    calibration, steps = manifest["calibration"], [*manifest.get("lineage", []), manifest]
    trainings = [training for step in steps for training in step.get("trainings", [])]
    seen = {"trained": {training["data"]["sha256"] for training in trainings}}
    seen["calibrated"] = set() if calibration is None else {calibration["text_sha256"]}
    for done, texts in seen.items():
        if text.sha256 in texts:
            raise UsageError(
                f"{text.name} is a text that {folder} was {done} on; a measurement on it says too "
                "little and is not saved",
                hint="Measure on another text, or without --save.",
            )


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of measurement: in which keys two of one setting agree, and whether one compares."""

    setting: tuple[str, ...]
    compared: Callable[[Mapping[str, Any]], bool]


_KINDS = {
    "evaluations": _Kind(
        ("text_sha256", "context", "stride", "windows", "dtype"),
        lambda found: found["against"] is not None,
    ),
    "retrieval": _Kind(
        ("text_sha256", "key", "lengths", "depths", "trials", "seed", "dtype"),
        lambda found: found["gain"]["source"] is not None,
    ),
    "tasks": _Kind(
        ("task", "dataset", "subset", "version", "harness", "fewshot", "limit", "dtype"),
        lambda found: found["metrics"][0]["mean"]["source"] is not None,
    ),
}


def without_results(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without any measurement, for a checkpoint that is to have other weights."""
    files = manifest["files"].items()
    return {
        **{key: value for key, value in manifest.items() if key not in _KINDS},
        "evaluations": [],
        "files": {name: record for name, record in files if not name.startswith(_EVAL_RESULTS)},
    }


def save_results(folder: Path, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Add measurements to ``kvpatch.json`` and to the model card made from it.

    A measurement in the same setting is replaced. The card is written first: if the run dies in
    between, ``verify`` says that the card is not the recorded one.

    Args:
        folder: The checkpoint.
        measured: By kind: ``evaluations`` on a text, ``retrieval`` of keys, ``tasks`` of
            lm-evaluation-harness, which also go into ``.eval_results``.

    Raises:
        InputModelError: If the folder was not made by kvpatch.
        OutputError: If its card was edited.
    """
    manifest = check_saveable(folder)
    for name, found in measured.items():
        new = [_setting(_KINDS[name], one) for one in found]
        kept = [one for one in manifest.get(name, []) if _setting(_KINDS[name], one) not in new]
        manifest[name] = [*kept, *map(dict, found)]
    written = {_CARD: write_file(folder / _CARD, render_card(manifest))}
    for task in measured.get("tasks", []):
        content = eval_results(task)
        if content is not None:
            file = f"{_EVAL_RESULTS}/{task['task'].replace('/', '_')}.yaml"
            (folder / _EVAL_RESULTS).mkdir(exist_ok=True)
            written[file] = write_file(folder / file, content)
    rewrite_manifest(folder, manifest, written)


def _setting(kind: _Kind, found: Mapping[str, Any]) -> tuple[object, ...]:
    return (*(found[key] for key in kind.setting), kind.compared(found))

"""The trained model as a normal folder: what its start was, with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.card import render_card
from convert.checkpoint.index import INDEX, index_json
from convert.checkpoint.manifest import encode_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.safetensors_header import tensor_bytes
from convert.checkpoint.staging import MANIFEST, Staging
from convert.checkpoint.writer import FileRecord, ShardWriter, copy_file, write_file
from convert.reporting.figures import render
from convert.reporting.training import training_curve
from kvpatch.errors import InputModelError, VerificationError

__all__ = ["CURVE", "check_files", "copy_files", "stored_names", "write_result", "write_weights"]

CURVE = "training.png"
_CARD = "README.md"
_MADE = {MANIFEST, _CARD, CURVE}


def check_files(start: Checkpoint, manifest: Mapping[str, Any]) -> None:
    """Refuse a model whose files are others than its kvpatch.json names: the result keeps them.

    Args:
        start: The model that is to be trained.
        manifest: Its kvpatch.json.

    Raises:
        InputModelError: If one is missing, or weights are in files of other names.
    """
    recorded = manifest["files"].keys() - _MADE
    strange = sorted(start.files.keys() - recorded)
    missing = sorted(name for name in recorded if not guarded_path(start.root, name).is_file())
    wrong = [*(f"{n} is not in it" for n in strange), *(f"{n} is missing" for n in missing)]
    if wrong:
        raise InputModelError(
            f"the files of {start.root.name} are not those of its kvpatch.json: "
            f"{'; '.join(wrong[:4])}",
            hint="Restore them, or convert again.",
        )


def stored_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that they have on the disk, which differ for some classes.

    Args:
        model: Of transformers, as it was loaded.
        state: Its weights by their names in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    return dict(revert_weight_conversion(model, dict(state)))


def write_result(
    staging: Staging,
    start: Checkpoint,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    progress: Callable[[int], None],
) -> None:
    """Write the trained weights in the files, order and dtypes of the start, and all else.

    Args:
        staging: Where the files go; shards that it has are not written again.
        start: The model that was trained, as it was.
        manifest: Of the result, but for the hashes of its files.
        weights: By their names on the disk; what is not there is copied from the start.
        progress: Called with the number of bytes of each tensor.

    Raises:
        VerificationError: If a weight has another shape than at the start, or is not finite.
    """
    files = write_weights(staging, start, weights, progress)
    if (start.root / INDEX).is_file():
        files[INDEX] = write_file(staging.path / INDEX, _index(start))
    files |= copy_files(start.root, staging, manifest["files"].keys() - files.keys() - _MADE)
    content = {key: value for key, value in manifest.items() if key not in {"files", "versions"}}
    picture = render(lambda: training_curve(content["trainings"][-1]))["png"]
    files[CURVE] = write_file(staging.path / CURVE, picture)
    files[_CARD] = write_file(staging.path / _CARD, render_card(content))
    write_file(staging.path / MANIFEST, encode_manifest(content, files))


def write_weights(
    staging: Staging,
    start: Checkpoint,
    weights: Mapping[str, Tensor],
    progress: Callable[[int], None],
) -> dict[str, FileRecord]:
    """Write the weight files alone, with arguments and errors as of ``write_result``."""
    for file in start.files:
        if file not in staging.finished:
            staging.record(file, _write_shard(staging, start, file, weights, progress), [])
    return {file: record for file, (record, _) in staging.finished.items()}


def _index(start: Checkpoint) -> bytes:
    """Of the result, whose names may not be those that the start has on the disk."""
    infos = start.tensors.values()
    return index_json(
        {name: info.file for name, info in start.tensors.items()},
        parameters=sum(prod(info.shape) for info in infos),
        size=sum(info.nbytes for info in infos),
    )


def copy_files(root: Path, staging: Staging, names: Iterable[str]) -> dict[str, FileRecord]:
    """Copy files of a folder, given by their names in it."""
    return {
        name: copy_file(guarded_path(root, name), staging.path / name) for name in sorted(names)
    }


def _write_shard(
    staging: Staging,
    start: Checkpoint,
    file: str,
    weights: Mapping[str, Tensor],
    progress: Callable[[int], None],
) -> FileRecord:
    tensors = [(name, info) for name, info in start.tensors.items() if info.file == file]
    tensors.sort(key=lambda item: item[1].start)
    header = [(name, info.dtype, info.shape) for name, info in tensors]
    with ShardWriter(staging.path / file, header) as writer:
        for name, info in tensors:
            weight = weights[name] if name in weights else start.read(name)
            if tuple(weight.shape) != info.shape:
                raise VerificationError(
                    f"{name!r} is {tuple(weight.shape)} after training, expected {info.shape}"
                )
            stored = weight.detach().to("cpu", info.dtype)
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                raise VerificationError(f"{name!r} is not finite in {info.dtype}")
            writer.write(tensor_bytes(stored))
            progress(info.nbytes)
        return writer.finish()

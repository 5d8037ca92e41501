"""State of a run on disk: a folder for each checkpoint, there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint.scratch import settle
from convert.checkpoint.writer import full_disk_is_our_error, write_file

__all__ = ["latest", "load", "save"]

_PREFIX, _WRITING, _STATE = "step-", "writing", "state.json"


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, if there is one."""
    return max(folder.glob(f"{_PREFIX}*"), default=None)


def save(folder: Path, accelerator: Any, step: int, state: Mapping[str, Any]) -> None:
    """Keep everything that the next steps depend on; older checkpoints go once it is durable.

    All processes call this.

    Args:
        folder: Of the checkpoints.
        accelerator: Has model, optimiser and random numbers.
        step: Steps that are done.
        state: All else, in plain data.

    Raises:
        ResourceError: If the disk is full; the checkpoint before is kept.
    """
    writing, final = folder / _WRITING, folder / f"{_PREFIX}{step:09d}"
    if accelerator.is_main_process:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with full_disk_is_our_error(writing):
        accelerator.save_state(str(writing))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_file(writing / _STATE, json.dumps(state).encode())
        older = [path for path in folder.glob(f"{_PREFIX}*") if path != final]
        shutil.rmtree(final, ignore_errors=True)
        settle(writing, final)
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load(checkpoint: Path, accelerator: Any) -> dict[str, Any]:
    """Put everything back that ``save`` kept, and return the plain data."""
    accelerator.load_state(str(checkpoint))
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    return state

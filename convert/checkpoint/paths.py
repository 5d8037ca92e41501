"""File names that come from outside: a checkpoint may only name files inside itself."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from kvpatch.errors import InputModelError

__all__ = ["guarded_path", "hub_blob_sha256", "hub_dataset", "hub_snapshot"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def guarded_path(root: Path, name: str) -> Path:
    """Path of file ``name`` of the checkpoint ``root``.

    Args:
        root: Checkpoint folder.
        name: Relative file name as an index states it.

    Raises:
        InputModelError: If the name is absolute, has a drive or a ``..``, holds control
            characters, or is a link that leaves the checkpoint. The Hub's cache layout, where
            ``snapshots/<commit>/`` links into ``blobs/``, is inside.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if (
        not name
        or any(ord(c) < 32 for c in name)
        or windows.drive
        or windows.root
        or posix.is_absolute()
        or ".." in windows.parts
        or ".." in posix.parts
    ):
        raise InputModelError(f"the checkpoint names the file {name!r}, which is outside of it")
    path = root / name
    try:
        path.stat()
        real = path.resolve()
    except FileNotFoundError:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no unicode, a link to itself
        raise InputModelError(f"the file name {name!r} cannot be used: {error}") from error
    allowed = [root.resolve()]
    if hub_snapshot(root) is not None:
        allowed.append((root.resolve().parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise InputModelError(f"{name} is a link that leaves the checkpoint (to {real})")
    return path


def hub_snapshot(root: Path) -> tuple[str, str] | None:
    """(repository, commit) of a Hub cache folder, ``models--org--name/snapshots/<commit>``."""
    root = root.resolve()
    repo = root.parent.parent.name
    if root.parent.name != "snapshots" or not repo.startswith("models--"):
        return None
    if not _COMMIT.fullmatch(root.name):
        return None
    return repo.removeprefix("models--").replace("--", "/"), root.name


def hub_dataset(path: Path) -> str | None:
    """The dataset that a file of the Hub's cache is of, ``datasets--org--name/snapshots/...``."""
    for folder in path.absolute().parents:  # not resolved: that leads to the blobs
        if folder.name == "snapshots" and folder.parent.name.startswith("datasets--"):
            return folder.parent.name.removeprefix("datasets--").replace("--", "/")
    return None


def hub_blob_sha256(path: Path) -> str | None:
    """The sha256 that the Hub recorded for a cached weight file: the name of its blob."""
    name = path.resolve().name
    return name if path.is_symlink() and _SHA256.fullmatch(name) else None

"""``kvpatch.json``: where a converted checkpoint comes from, and what every file must hash to."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import read_json
from convert.checkpoint.staging import MANIFEST
from convert.checkpoint.writer import FileRecord, write_file
from kvpatch import __version__
from kvpatch.errors import InputModelError

__all__ = [
    "FORMAT_VERSION",
    "changed_files",
    "encode_manifest",
    "read_manifest",
    "rewrite_manifest",
    "tool_versions",
]

FORMAT_VERSION = 1


def tool_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("torch", "safetensors", "numpy")
    return {
        "kvpatch": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def encode_manifest(content: Mapping[str, Any], files: Mapping[str, FileRecord]) -> bytes:
    """The manifest's bytes: sorted keys, no times, no absolute paths, so that runs agree.

    Args:
        content: Source, recipe, cache sizes, layer results.
        files: Every file of the result but the manifest itself.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": tool_versions(),
        **content,
        "files": {name: asdict(record) for name, record in files.items()},
    }
    return _encode(manifest)


def rewrite_manifest(
    folder: Path, manifest: Mapping[str, Any], changed: Mapping[str, FileRecord]
) -> None:
    """Replace the manifest of a checkpoint, with new records of the files that changed."""
    files = manifest["files"] | {name: asdict(record) for name, record in changed.items()}
    write_file(folder / MANIFEST, _encode({**manifest, "files": files}))


def _encode(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
        InputModelError: If there is none, or it is of another format.
    """
    if not (folder / MANIFEST).is_file():
        raise InputModelError(f"{folder} has no {MANIFEST}; it was not made by kvpatch")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputModelError(
            f"{folder / MANIFEST} has format {manifest.get('format_version')!r}, "
            f"this kvpatch reads {FORMAT_VERSION}",
            hint="Use the kvpatch version named in it.",
        )
    return manifest


def changed_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What in a folder is not as its manifest says, file by file; nothing if all is.

    Raises:
        InputModelError: If the manifest names a file outside the folder.
    """
    files: Mapping[str, Any] = manifest["files"]
    changes = []
    for name, record in files.items():
        path = guarded_path(folder, name)
        if not path.is_file():
            changes.append(f"{name} is missing")
        elif path.stat().st_size != record["size"]:
            size = path.stat().st_size
            changes.append(f"{name} has {size:,} bytes, expected {record['size']:,}")
        else:
            with path.open("rb") as stream:
                if file_digest(stream, "sha256").hexdigest() != record["sha256"]:
                    changes.append(f"{name} has another sha256")
    stray = {p.name for p in folder.iterdir() if p.suffix in {".safetensors", ".bin"}} - set(files)
    return changes + [f"{name} was not written by the conversion" for name in sorted(stray)]

"""Guarded reading of a checkpoint folder: headers first, then bytes by pread."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from convert.checkpoint.index import INDEX, numbered_shards
from convert.checkpoint.paths import guarded_path, hub_blob_sha256
from convert.checkpoint.pickle_shard import read_pickle
from convert.checkpoint.safetensors_header import (
    TensorInfo,
    read_header,
    tensor_bytes,
    unique_json,
)
from convert.resources import check_platform
from kvpatch.errors import InputModelError, UntrustedSourceError

__all__ = ["CHUNK_BYTES", "Checkpoint", "FileState", "read_json"]

CHUNK_BYTES = 8 << 20
MAX_INDEX_BYTES = 100_000_000
_MOST_BYTES = 1 << 30  # read in one call; macOS refuses two of these
_SINGLE = "model.safetensors"
_PICKLE_SINGLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class FileState:
    """Size and time of change of a weight file, to notice that it changes under us."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """State of ``path`` now."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns)


class Checkpoint:
    """A checkpoint folder, open for reading. Use as a context manager.

    Opening reads ``config.json`` and the headers of all shards and checks them against each
    other; ``read`` and ``chunks`` then use pread, so that a file that shrinks meanwhile is an
    error and not a crash.

    Args:
        root: The folder.
        allow_pickle: Read ``.bin`` files too, with ``weights_only``.
        sizes: Bytes of each weight file, where only its header is there: tensors have shapes
            and places, but cannot be read.

    Raises:
        InputModelError: For any damage or contradiction in what is there.
        UsageError: On Windows itself.
    """

    def __init__(
        self,
        root: Path,
        *,
        allow_pickle: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        check_platform()
        self.root = root
        self._sizes = sizes or {}
        self.config = _read_config(root)
        self.warnings: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        names, weight_map = _weight_files(root, allow_pickle)
        self.paths = {name: guarded_path(root, name) for name in names}
        for name, path in self.paths.items():
            if not path.is_file():
                raise InputModelError(
                    f"{name} is missing in {root}",
                    hint=f"Download it: hf download ORG/NAME {shlex.quote(name)} --local-dir "
                    f"{shlex.quote(str(root))}",
                )
        self.files = {name: FileState.of(path) for name, path in self.paths.items()}
        self._open_shards(weight_map)
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def rename(self, names: Mapping[str, str]) -> None:
        """Go on with these tensors alone.

        Args:
            names: The names of tensors from now on, by those they have until now.
        """
        self.tensors = {new: self.tensors[old] for old, new in names.items()}

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Bytes of a tensor in order, at most ``size`` at a time (a multiple of 8).

        Each chunk is valid until the next is asked for.
        """
        info = self.tensors[name]
        buffer = memoryview(bytearray(min(size, info.nbytes)))
        for start in range(0, info.nbytes, size):
            part = buffer[: min(size, info.nbytes - start)]
            self._fill(info.file, info.start + start, part)
            yield part

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self._fill(info.file, info.start, tensor_bytes(tensor))
        return tensor

    def sha256(self, file: str, cancelled: Event | None = None) -> str:
        """Hash of a whole weight file; of its beginning if ``cancelled`` is set meanwhile.

        Raises:
            InputModelError: If it differs from what the Hub recorded for a cached file.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with _read_errors(file), self.paths[file].open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                if cancelled is not None and cancelled.is_set():
                    return digest.hexdigest()
        expected = hub_blob_sha256(self.paths[file])
        if expected is not None and digest.hexdigest() != expected:
            raise UntrustedSourceError(
                f"{file} is damaged: sha256 {digest.hexdigest()}, the Hub has {expected}",
                hint=f"Delete {self.paths[file].resolve()} and download again.",
            )
        return digest.hexdigest()

    def check_unchanged(self, file: str) -> None:
        """Refuse a weight file that was replaced or written to since it was opened.

        Raises:
            InputModelError: If size or time of change differ, or the file is gone.
        """
        try:
            now = FileState.of(self.paths[file])
        except OSError as error:
            raise UntrustedSourceError(f"{file} disappeared during the run: {error}") from error
        if now != self.files[file]:
            raise UntrustedSourceError(
                f"{file} changed during the run ({self.files[file].size:,} bytes, "
                f"now {now.size:,})",
                hint="Make sure that nothing writes to the source, and run again.",
            )

    def _open_shards(self, weight_map: Mapping[str, str] | None) -> None:
        for name, path in self.paths.items():
            if name.endswith(".bin"):
                infos = read_pickle(path, name)
            else:
                infos = read_header(path, name, self._sizes.get(name))
            for info in infos:
                if (other := self.tensors.get(info.name)) is not None:
                    raise InputModelError(
                        f"{other.file} and {name} both hold {info.name!r}; they may disagree, and "
                        "readers differ in which one they take",
                        hint="Leave the shards of one save alone in the folder.",
                    )
                self.tensors[info.name] = info
        index = {} if weight_map is None else weight_map
        unnamed = sorted(self.tensors.keys() - index.keys()) if index else []
        if unnamed:  # transformers reads the files whole
            self.warnings.append(
                f"the index does not name {len(unnamed)} tensors that are in its shards, which are "
                f"read all the same, as by transformers: {', '.join(map(repr, unnamed[:5]))}"
            )
        held = self.tensors.items()
        missing = sorted(index.items() - {(tensor, info.file) for tensor, info in held})
        if missing:
            shown = ", ".join(repr(name) for name, _ in missing[:5])
            raise InputModelError(
                f"the index names {len(missing)} tensors that their shards do not hold: {shown}",
                hint="If they are of the model, download the checkpoint again; if not, make the "
                f"index anew from its shards: kvpatch reindex {shlex.quote(str(self.root))}",
            )
        if not self.tensors:
            raise InputModelError(f"{self.root} holds no tensors")

    def _fill(self, file: str, offset: int, target: memoryview) -> None:
        assert file not in self._sizes, f"only the header of {file} is here"
        if file not in self._descriptors:
            with _read_errors(file):
                self._descriptors[file] = os.open(self.paths[file], os.O_RDONLY)
        done = 0
        while done < len(target):
            with _read_errors(file):
                part = target[done : done + _MOST_BYTES]
                count = os.preadv(self._descriptors[file], [part], offset + done)
            if count == 0:
                raise UntrustedSourceError(
                    f"{file} ended at byte {offset + done:,} while it was read; "
                    f"it had {self.files[file].size:,} bytes before",
                    hint="Make sure that nothing writes to the source, and run again.",
                )
            done += count


@contextmanager
def _read_errors(file: str) -> Iterator[None]:
    """A disk or network that fails, or a file that is gone, is an error of the source."""
    try:
        yield
    except FileNotFoundError as error:
        raise UntrustedSourceError(f"{file} disappeared during the run") from error
    except OSError as error:
        raise InputModelError(f"{file} cannot be read: {os.strerror(error.errno or 0)}") from error


def read_json(path: Path, *, limit: int = MAX_INDEX_BYTES) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        InputModelError: If it is absent, too large, or not an object.
    """
    if not path.is_file():
        raise InputModelError(f"{path.name} is missing in {path.parent}")
    size = path.stat().st_size
    if size > limit:
        raise InputModelError(f"{path.name} has {size:,} bytes, more than {limit:,}")
    value = unique_json(path.read_bytes(), path.name)
    if not isinstance(value, dict):
        raise InputModelError(f"{path.name} is not a JSON object")
    return value


def _read_config(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise InputModelError(f"{root} is not a folder")
    return read_json(guarded_path(root, "config.json"))


def _weight_files(root: Path, allow_pickle: bool) -> tuple[list[str], Mapping[str, str] | None]:
    """Names of the weight files in order, and the index's weight map if there is an index."""
    single, index = (root / _SINGLE).exists(), (root / INDEX).exists()
    if index:
        weight_map = _read_weight_map(guarded_path(root, INDEX), ".safetensors")
        names = sorted(set(weight_map.values()))
        if single and names != [_SINGLE]:
            raise InputModelError(
                f"{root} holds both {_SINGLE} and {INDEX}; they may disagree, and readers "
                "differ in which one they take",
                hint="Remove the one that is stale.",
            )
        return names, weight_map
    if single:
        return [_SINGLE], None
    if shards := numbered_shards(root):
        raise InputModelError(
            f"{root} has shards ({next(iter(shards))}, ...) but no {INDEX}",
            hint=f"Make the index from them: kvpatch reindex {shlex.quote(str(root))}",
        )
    pickled, pickled_index = (root / _PICKLE_SINGLE).exists(), (root / _PICKLE_INDEX).exists()
    if not (pickled or pickled_index):
        if gguf := next(root.glob("*.gguf"), None):
            raise InputModelError(
                f"{root} has its weights in a GGUF file ({gguf.name}), which is not read",
                hint="Convert the safetensors checkpoint that it was made from.",
            )
        if shard := next(root.glob("pytorch_model-*-of-*.bin"), None):
            raise InputModelError(
                f"{root} has pickled shards ({shard.name}, ...) but no {_PICKLE_INDEX}",
                hint=f"Download {_PICKLE_INDEX}, too, or use a safetensors revision.",
            )
        raise InputModelError(
            f"{root} has no weights: neither {_SINGLE} nor {INDEX}",
            hint="Download the weights of the checkpoint.",
        )
    if not allow_pickle:
        raise InputModelError(
            f"{root} has only pickled weights (.bin), which can run code when loaded",
            hint="Use a safetensors revision, or --allow-pickle to read them with weights_only.",
        )
    if pickled_index:
        weight_map = _read_weight_map(guarded_path(root, _PICKLE_INDEX), ".bin")
        return sorted(set(weight_map.values())), weight_map
    return [_PICKLE_SINGLE], None


def _read_weight_map(path: Path, extension: str) -> Mapping[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputModelError(f"{path.name}: weight_map is absent or empty")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(extension):
            raise InputModelError(
                f"{path.name}: weight_map sends {tensor!r} to {file!r}, "
                f"expected the name of a {extension} file"
            )
    return weight_map

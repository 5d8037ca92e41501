"""Writing into a staging folder: safetensors as a stream, small files in one go, all fsynced."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from convert.checkpoint.safetensors_header import encode_header
from kvpatch.errors import ResourceError

__all__ = ["FileRecord", "ShardWriter", "copy_file", "full_disk_is_our_error", "write_file"]

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest states of one file."""

    size: int
    sha256: str


class ShardWriter:
    """One safetensors file, written front to back without holding its tensors.

    The header is known from the plan, so bytes go to disk as they come while a second thread
    hashes them. Nothing is valid until ``finish`` has returned.

    Args:
        path: File to create; must not exist.
        tensors: (name, dtype, shape) in the order in which their bytes will come.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    ) -> None:
        header = encode_header(tensors)
        data = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in tensors)
        self._path = path
        self._expected = len(header) + data
        self._size = 0
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        # 0o666 lets the umask decide the mode, as for any file a program makes
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self.write(memoryview(header))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hasher.shutdown()
        os.close(self._descriptor)

    def write(self, data: memoryview) -> None:
        """Append bytes; ``data`` may be reused once this returns."""
        hashed = self._hasher.submit(self._digest.update, data)
        try:
            with full_disk_is_our_error(self._path):
                _write_all(self._descriptor, data)
        finally:
            hashed.result()
        self._size += len(data)

    def finish(self) -> FileRecord:
        """Flush to the disk itself and state what was written."""
        assert self._size == self._expected, (self._path, self._size, self._expected)
        with full_disk_is_our_error(self._path):
            os.fsync(self._descriptor)
        return FileRecord(self._size, self._digest.hexdigest())


@contextmanager
def full_disk_is_our_error(path: Path) -> Iterator[None]:
    """Turn a full disk or an exceeded quota into a ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ResourceError(
            f"{os.strerror(error.errno or 0)} while writing {path}",
            hint="Finished shards are kept. Free some space and run the same command again.",
        ) from error


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a small file, replacing it atomically if it is there."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with full_disk_is_our_error(path):
            _write_all(descriptor, memoryview(content))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a side file byte for byte, making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_file(target, source.read_bytes())


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])

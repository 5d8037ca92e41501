"""The write protocol: lock, stage beside the output, journal, publish by rename.

The output path holds either nothing, or what was there before, or the finished result. A run that
is killed leaves a staging folder ``.<name>.partial-<plan>``; the same command finds it by the hash
of its plan, trusts the shards whose size and sha256 match the journal, and writes the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from convert.checkpoint.writer import FileRecord, full_disk_is_our_error
from convert.signals import at_hard_end
from kvpatch import __version__
from kvpatch.errors import OutputError, UntrustedSourceError, UsageError

__all__ = ["MANIFEST", "Staging", "check_output", "unfinished"]

MANIFEST = "kvpatch.json"
_JOURNAL = ".journal.jsonl"
_SCRATCH = ".scratch"
_FORMAT = 1


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any work is done.

    Raises:
        UsageError: If the output is the source, inside it or around it.
        OutputError: If it exists (without ``overwrite``), is a file, is no earlier result of
            ours, or its folder cannot be written.
    """
    target, origin, here = out.absolute().resolve(), source.resolve(), Path.cwd()
    if target == here or target in here.parents:
        raise UsageError(f"the output {out} is the current folder, or holds it")
    if target == origin or origin in target.parents or target in origin.parents:
        raise UsageError(
            f"the output {out} and the source {source} lie in each other",
            hint="Choose an output folder outside the source.",
        )
    _check_replaceable(out, overwrite=overwrite)
    parent = next(path for path in (target.parent, *target.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {parent}, which is to hold the output")


def unfinished(out: Path) -> list[Path]:
    """Staging folders that unfinished conversions to an output left."""
    return sorted(out.absolute().parent.glob(f".{out.absolute().name}.partial-*"))


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse to put a result where something stands that is not ours to replace."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"the output {out} exists and is not a folder")
    if out.exists():
        content = sorted(path.name for path in out.iterdir())
        if content and not overwrite:
            shown = ", ".join(content[:6]) + (", ..." if len(content) > 6 else "")
            raise OutputError(
                f"the output {out} exists and holds {shown}",
                hint="Choose another path, or --overwrite to replace an earlier result.",
            )
        if content and MANIFEST not in content:
            raise OutputError(
                f"{out} holds no {MANIFEST}, so it was not made by kvpatch and is not replaced",
                hint="Choose another path, or remove the folder yourself.",
            )


class Staging:
    """The folder in which an output grows. Use as a context manager; it holds the output's lock.

    Args:
        out: Path of the output.
        plan_id: Hash of the plan; names the staging folder.
        resume: Continue what an earlier run of the same plan left; else discard it.
        overwrite: Replace what stands at ``out`` when publishing.

    Raises:
        OutputError: If another process works on the output, or the staging folder was left by
            another version.
    """

    def __init__(self, out: Path, plan_id: str, *, resume: bool, overwrite: bool) -> None:
        self.out = out.absolute()
        self.path = self.out.with_name(f".{self.out.name}.partial-{plan_id[:12]}")
        self._aside = self.out.with_name(f".{self.out.name}.replaced")
        self._resume = resume
        self._overwrite = overwrite
        self._lock = filelock.FileLock(
            self.out.with_name(f".{self.out.name}.kvpatch-lock"), timeout=0
        )
        self._hard_end = contextlib.ExitStack()
        self.finished: dict[str, tuple[FileRecord, list[dict[str, Any]]]] = {}

    def __enter__(self) -> Self:
        with full_disk_is_our_error(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            self._restore_interrupted_swap()
            with full_disk_is_our_error(self.path):
                self._open()
        except BaseException:
            self._drop_lock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # nothing is worth resuming if no shard is done, or if the source is not what it was
        begun = self.finished or (self.scratch.exists() and any(self.scratch.iterdir()))
        if self.path.exists() and (not begun or isinstance(error, UntrustedSourceError)):
            shutil.rmtree(self.path)
        self._drop_lock()

    @property
    def scratch(self) -> Path:
        """Folder for what an interrupted run wants to find again and the output does not hold."""
        return self.path / _SCRATCH

    @property
    def leftovers(self) -> list[Path]:
        """Staging folders that other, unfinished conversions to this output left."""
        return [folder for folder in unfinished(self.out) if folder != self.path]

    def record(self, file: str, record: FileRecord, results: list[dict[str, Any]]) -> None:
        """Journal a finished shard with the results of its layers, durably."""
        line = {"file": file, **dataclasses.asdict(record), "results": results}
        self._append(line)
        self.finished[file] = (record, results)

    def publish(self) -> None:
        """Make the staging folder the output, in one rename.

        Raises:
            OutputError: If something appeared at the output path meanwhile.
        """
        _check_replaceable(self.out, overwrite=self._overwrite)
        with full_disk_is_our_error(self.path):
            (self.path / _JOURNAL).unlink()
            if self.scratch.exists():
                shutil.rmtree(self.scratch)
            for folder in (*filter(Path.is_dir, self.path.rglob("*")), self.path):
                _fsync_folder(folder)
        try:
            if self.out.exists():
                self.out.rename(self._aside)
            self.path.rename(self.out)
        except OSError as error:
            self._restore_interrupted_swap()
            raise OutputError(f"cannot publish {self.out}: {error}") from error
        with full_disk_is_our_error(self.out):
            _fsync_folder(self.out.parent)
        if self._aside.exists():
            shutil.rmtree(self._aside)

    def _take_lock(self) -> None:
        lock = Path(self._lock.lock_file)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            holder = lock.read_text(errors="replace").strip()
            raise OutputError(
                f"another process writes to {self.out}" + (f" ({holder})" if holder else ""),
                hint="Wait for it to end, or choose another output.",
            ) from None
        except OSError as error:
            raise OutputError(f"cannot lock {lock}: {error}") from error
        self._hard_end.enter_context(at_hard_end(lambda _: lock.unlink(missing_ok=True)))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            lock.write_text(f"pid {os.getpid()} on {socket.gethostname()} since {now}\n")
        except OSError:
            self._drop_lock()
            raise

    def _drop_lock(self) -> None:
        self._hard_end.close()
        Path(self._lock.lock_file).unlink(missing_ok=True)  # while held: nobody else can have it
        self._lock.release()

    def _restore_interrupted_swap(self) -> None:
        if not self._aside.exists():
            return
        if (self.out / MANIFEST).exists():
            shutil.rmtree(self._aside)
        elif not self.out.exists() or not any(self.out.iterdir()):
            self._aside.rename(self.out)  # also over an empty folder

    def _open(self) -> None:
        if self.path.exists() and not self._resume:
            shutil.rmtree(self.path)
        if self.path.exists():
            self._read_journal()
        else:
            self.path.mkdir()
            self._append({"format": _FORMAT, "kvpatch": __version__})
        for path in sorted(self.path.rglob("*"), reverse=True):
            name = str(path.relative_to(self.path))
            if name not in {_JOURNAL, *self.finished} and not name.startswith(_SCRATCH):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_journal(self) -> None:
        journal = self.path / _JOURNAL
        whole, _, torn = (journal.read_bytes() if journal.exists() else b"").rpartition(b"\n")
        if torn:  # cut off what a crash left unfinished, so that the next line stands alone
            os.truncate(journal, len(whole) + 1 if whole else 0)
        lines = whole.split(b"\n") if whole else []
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a torn line: its shard is written again
                entries.append(json.loads(line))
        if not entries:
            self._append({"format": _FORMAT, "kvpatch": __version__})
            return
        head, *shards = entries
        if (head.get("format"), head.get("kvpatch")) != (_FORMAT, __version__):
            raise OutputError(
                f"{self.path} was left by kvpatch {head.get('kvpatch')} "
                f"(format {head.get('format')}), this is {__version__} (format {_FORMAT})",
                hint="Run with --no-resume to start over.",
            )
        for entry in shards:
            record = FileRecord(entry["size"], entry["sha256"])
            if _matches(self.path / entry["file"], record):
                self.finished[entry["file"]] = (record, entry["results"])

    def _append(self, line: dict[str, Any]) -> None:
        journal = self.path / _JOURNAL
        with full_disk_is_our_error(journal), journal.open("ab") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def _matches(path: Path, record: FileRecord) -> bool:
    if not path.is_file() or path.stat().st_size != record.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == record.sha256


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

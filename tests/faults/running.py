"""Runs of the command line: in this process, or in a child that may be killed, with faults."""

from __future__ import annotations

import errno
import functools
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from convert.cli import app
from convert.signals import ending_soon
from tests.flags import unknown_flags

__all__ = [
    "Child",
    "DiskFull",
    "KillInside",
    "Run",
    "SignalAfterShard",
    "SignalAtDiskCall",
    "cli",
    "contents",
    "disk_calls",
    "gqa",
    "names",
    "peak_memory",
    "run_child",
]

# every way in which a run changes the disk, but for the writes of a buffered file
_DISK_CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")

# children are forked from a clean process without threads that has torch imported already
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.preloaded", __name__])


class Run(NamedTuple):
    """How a run ended; the code is negative where a signal ended it."""

    code: int
    out: str
    err: str


def gqa(source: Path | str, out: Path, *flags: str) -> list[str]:
    """Arguments of the conversion that the tests run: eight KV heads to two, many shards."""
    return ["gqa", str(source), str(out), "--kv-heads", "2", "--max-shard-size", "40KB", *flags]


def cli(arguments: list[str]) -> Run:
    """Run the command line in this process."""
    code: Any = 0
    with CliRunner().isolation() as (out, err, _):
        try:
            _command().main(args=arguments, prog_name="kvpatch")
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        run = Run(code, out.getvalue().decode(), err.getvalue().decode())
    _check_hints(arguments, run.err)
    return run


@functools.cache
def _command() -> Any:
    """What typer makes of the app; it takes longer than most refusals."""
    return get_command(app)


def _check_hints(arguments: list[str], said: str) -> None:
    """A hint must name flags of the command at hand only, or of the one that it names."""
    for hint in re.findall(r"^hint: (.*)", said, re.MULTILINE):
        assert arguments[0] == "run" or not unknown_flags(arguments[0], hint), hint


class Child:
    """A run in a process of its own.

    Args:
        arguments: Of the command line.
        faults: Called in the child before the run; must pickle.
        environment: Variables set in the child; None removes one.
    """

    def __init__(
        self,
        arguments: list[str],
        *faults: Callable[[], None],
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self._readers, writers = zip(*(_CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
        self.process = _CONTEXT.Process(
            target=_child, args=(arguments, faults, environment or {}, writers), daemon=True
        )
        self.process.start()
        for writer in writers:
            writer.close()

    def wait(self) -> Run:
        """Wait for the end of the child; its output must fit into a pipe."""
        self.process.join(60)
        code = self.process.exitcode
        assert code is not None, "the child hangs"
        out, err = (_drain(reader) for reader in self._readers)
        return Run(code, out, err)


def run_child(
    arguments: list[str],
    *faults: Callable[[], None],
    environment: Mapping[str, str | None] | None = None,
) -> Run:
    """Run the command line in a child and wait for its end."""
    return Child(arguments, *faults, environment=environment).wait()


def _child(
    arguments: list[str],
    faults: tuple[Callable[[], None], ...],
    environment: Mapping[str, str | None],
    writers: tuple[Connection, Connection],
) -> None:
    for descriptor, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), descriptor)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    for fault in faults:
        fault()
    with ending_soon():
        app(arguments, prog_name="kvpatch")


def _drain(reader: Connection) -> str:
    with os.fdopen(os.dup(reader.fileno()), "rb") as stream:
        text = stream.read().decode()
    reader.close()
    return text


@dataclass(frozen=True)
class SignalAtDiskCall:
    """The process sends itself a signal before its n-th call that may change the disk."""

    signal: signal.Signals
    call: int

    def __call__(self) -> None:
        count = itertools.count(1)

        def strike(_: str) -> None:
            if next(count) == self.call:
                os.kill(os.getpid(), self.signal)

        _watch_disk(strike, setattr)


def disk_calls(patch: pytest.MonkeyPatch, arguments: list[str]) -> list[str]:
    """The calls that ``SignalAtDiskCall`` counts, of a run that must succeed."""
    calls: list[str] = []
    _watch_disk(calls.append, patch.setattr)
    run = cli(arguments)
    assert run.code == 0, run.err
    return calls


def _watch_disk(
    before: Callable[[str], None], replace: Callable[[Any, str, Callable[..., Any]], None]
) -> None:
    """Let every function that changes the disk tell ``before`` what it is called with."""

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **options: Any) -> Any:
            before(f"{name} {args[0]}")
            return original(*args, **options)

        return function

    for name in _DISK_CALLS:
        replace(os, name, watched(name, getattr(os, name)))


@dataclass(frozen=True)
class SignalAfterShard:
    """The process sends itself a signal when so many shards are in the journal."""

    signal: signal.Signals
    shards: int

    def __call__(self) -> None:
        from convert.checkpoint.staging import Staging

        original = Staging.record

        def record(staging: Staging, *args: Any) -> None:
            original(staging, *args)
            if len(staging.finished) == self.shards:
                os.kill(os.getpid(), self.signal)

        Staging.record = record  # type: ignore[method-assign]


@dataclass(frozen=True)
class KillInside:
    """SIGKILL this process at the given call of a function, before or after it."""

    module: str
    name: str
    call: int
    after: bool = False

    def __call__(self) -> None:
        from importlib import import_module

        holder = import_module(self.module)
        owner, _, attribute = self.name.rpartition(".")
        holder = getattr(holder, owner) if owner else holder
        plain, calls = getattr(holder, attribute), 0

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args, **kwargs)
            if calls == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, attribute, counted)


class DiskFull:
    """Planted in ``os``: after so many bytes every write fails, as on a full disk.

    Like a file system, the write that crosses the limit is cut short.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int = errno.ENOSPC):
        self._write, self._room, self._code = os.write, room, code
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if not self._room:
            raise OSError(self._code, os.strerror(self._code))
        count = self._write(descriptor, data[: self._room])
        self._room -= count
        return count


# The high-water mark of this very process: ru_maxrss would also count the process it was forked
# from.
_MEASURED = """
import re, sys
from pathlib import Path
from convert.cli import app
app(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_memory(arguments: list[str]) -> int:
    """Most memory that the command had resident, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return 1024 * int(run.stdout.split()[-1])


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything under a folder, hidden or not: bytes of files, targets of links, None for folders.

    Two folders with equal contents are equal for every reader.
    """
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def names(folder: Path) -> list[str]:
    """Names of all entries of a folder, hidden or not, sorted."""
    return sorted(path.name for path in folder.iterdir())

"""The output: what stands there is untouched until the result replaces it whole."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from convert.checkpoint.staging import Staging
from tests.faults.running import (
    Child,
    DiskFull,
    SignalAfterShard,
    SignalAtDiskCall,
    cli,
    contents,
    disk_calls,
    gqa,
    names,
    run_child,
)


@pytest.fixture
def earlier(source: Path, tmp_path: Path) -> Path:
    """An output that holds the result of another conversion."""
    out = tmp_path / "out"
    assert cli(["mqa", str(source), str(out)]).code == 0
    return out


def _no_work(*_: object) -> None:
    raise AssertionError("work began before the output was checked")


def _folder(out: Path) -> None:
    out.mkdir()
    for name in ("notes.txt", "more.txt"):
        (out / name).write_text("mine")


def _file(out: Path) -> None:
    out.write_text("mine")


def _link(out: Path) -> None:
    out.with_name("elsewhere").mkdir()
    out.symlink_to("elsewhere")


def _dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_folder, {(): "holds more.txt, notes.txt", ("--overwrite",): "not made by kvpatch"}),
        (_file, "is not a folder"),
        (_link, "is not a folder"),
        (_dangling_link, "is not a folder"),
    ],
    ids=["folder", "file", "link", "dangling-link"],
)
def test_something_foreign_at_the_output(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    message: str | dict[tuple[str, ...], str],
    flags: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    make(out)
    before = contents(tmp_path)
    monkeypatch.setattr(Staging, "__enter__", _no_work)
    run = cli(gqa(source, out, *flags))
    assert run.code == 7
    assert str(out) in run.err
    assert (message if isinstance(message, str) else message[flags]) in run.err
    assert contents(tmp_path) == before


def test_an_earlier_result_is_replaced_only_on_demand(source: Path, earlier: Path) -> None:
    before = contents(earlier.parent)
    run = cli(gqa(source, earlier))
    assert run.code == 7
    assert "--overwrite" in run.err
    assert contents(earlier.parent) == before


@pytest.mark.parametrize(
    "place",
    ["source", "source/inside/deep", ".", "other/../source/inside", "alias/inside"],
    ids=["equal", "inside", "around", "dotted", "through-a-link"],
)
def test_output_and_source_lie_in_each_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    (tmp_path / "other").mkdir()
    (tmp_path / "alias").symlink_to(copy)
    before = contents(tmp_path)
    monkeypatch.setattr(Staging, "__enter__", _no_work)
    run = cli(gqa(copy, tmp_path / place, "--overwrite"))
    assert run.code == 2
    assert "lie in each other" in run.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["out", "new/deeper/out"])
def test_folder_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    # modes do not bind the superuser, as whom tests often run
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    run = cli(gqa(source, tmp_path / place))
    assert run.code == 7
    assert f"cannot write to {tmp_path}" in run.err
    assert not contents(tmp_path)


def test_parent_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run = cli(gqa(source, tmp_path / "file" / "out"))
    assert run.code == 7
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty-folder"])
def test_nothing_is_left_beside_the_result(
    source: Path, tmp_path: Path, expected: dict[str, bytes | str | None], exists: bool
) -> None:
    out = tmp_path / "new" / "out"
    if exists:
        out.mkdir(parents=True)
    assert cli(gqa(source, out)).code == 0
    assert names(tmp_path / "new") == ["out"]
    assert contents(out) == expected
    assert not [name for name in expected if Path(name).name.startswith(".")]


def test_overwrite_replaces_an_earlier_result(
    source: Path, earlier: Path, expected: dict[str, bytes | str | None]
) -> None:
    assert contents(earlier) != expected
    assert cli(gqa(source, earlier, "--overwrite")).code == 0
    assert contents(earlier) == expected
    assert names(earlier.parent) == ["out"]


@pytest.mark.parametrize("room", [200, 100_000, 250_000], ids=["journal", "shards", "last"])
def test_overwrite_that_runs_out_of_disk_keeps_the_earlier_result(
    source: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    before = contents(earlier)
    with monkeypatch.context() as patch:
        DiskFull(patch, room)
        assert cli(gqa(source, earlier, "--overwrite")).code == 4
    assert contents(earlier) == before


def test_overwrite_that_cannot_publish_keeps_the_earlier_result(
    source: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(earlier)
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if ".partial-" in str(old):
            raise PermissionError(13, "Permission denied")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        run = cli(gqa(source, earlier, "--overwrite"))
    assert run.code == 7
    assert "cannot publish" in run.err
    assert contents(earlier) == before


def test_overwrite_killed_at_any_call_around_the_swap(
    source: Path,
    earlier: Path,
    expected: dict[str, bytes | str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every moment the old or the new result is there, whole, and the next run finishes."""
    parent, saved = earlier.parent, earlier.parent.with_name("saved")
    old = contents(earlier)
    shutil.copytree(parent, saved)
    with monkeypatch.context() as patch:
        calls = disk_calls(patch, gqa(source, earlier, "--overwrite"))
    swap = next(n for n, call in enumerate(calls, 1) if call.startswith("rename"))
    for call in range(swap, len(calls) + 1):
        shutil.rmtree(parent)
        shutil.copytree(saved, parent)
        killed = run_child(
            gqa(source, earlier, "--overwrite"), SignalAtDiskCall(signal.SIGKILL, call)
        )
        assert killed.code == -signal.SIGKILL, calls[call - 1]
        if earlier.exists():
            assert contents(earlier) in (old, expected), calls[call - 1]
        else:
            assert contents(parent / ".out.replaced") == old, calls[call - 1]
        assert cli(gqa(source, earlier, "--overwrite")).code == 0, calls[call - 1]
        assert contents(earlier) == expected, calls[call - 1]
        assert names(parent) == ["out"], calls[call - 1]


def test_result_set_aside_survives_until_it_is_replaced(
    source: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two renames, then an empty folder at the output, then a full disk."""
    old = contents(earlier)
    earlier.rename(earlier.with_name(".out.replaced"))
    earlier.mkdir()
    with monkeypatch.context() as patch:
        DiskFull(patch, room=100_000)
        assert cli(gqa(source, earlier)).code == 4
    assert old in (contents(earlier), contents(earlier.with_name(".out.replaced")))


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("make", [_folder, _file, _link], ids=["folder", "file", "link"])
def test_something_foreign_appears_at_the_output_during_the_run(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    flags: tuple[str, ...],
) -> None:
    foreign, out = tmp_path / "foreign", tmp_path / "work" / "out"
    foreign.mkdir()
    make(foreign / "out")
    publish = Staging.publish

    def late(staging: Staging) -> None:
        make(out)
        publish(staging)

    monkeypatch.setattr(Staging, "publish", late)
    assert cli(gqa(source, out, *flags)).code == 7
    found = {name: what for name, what in contents(out.parent).items() if name[0] != "."}
    assert found == contents(foreign)


@pytest.fixture
def stopped(source: Path, tmp_path: Path) -> Iterator[Child]:
    """A run to ``out`` that holds still after its second shard."""
    child = Child(gqa(source, tmp_path / "out"), SignalAfterShard(signal.SIGSTOP, 2))
    process = psutil.Process(child.process.pid)
    deadline = time.monotonic() + 60
    while process.status() != psutil.STATUS_STOPPED:
        assert child.process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield child
    if child.process.is_alive():
        child.process.kill()
        child.process.join()


def test_two_runs_to_one_output(
    source: Path, tmp_path: Path, stopped: Child, expected: dict[str, bytes | str | None]
) -> None:
    pid = stopped.process.pid
    assert pid is not None
    before = contents(tmp_path)
    for flags in ((), ("--overwrite",), ("--no-resume",)):
        second = cli(gqa(source, tmp_path / "out", *flags))
        assert second.code == 7
        assert f"pid {pid} on {socket.gethostname()}" in second.err
        assert contents(tmp_path) == before
    os.kill(pid, signal.SIGCONT)
    assert stopped.wait().code == 0
    assert contents(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]


def test_lock_dies_with_its_holder(
    source: Path, tmp_path: Path, stopped: Child, expected: dict[str, bytes | str | None]
) -> None:
    stopped.process.kill()
    stopped.process.join()
    assert (tmp_path / ".out.kvpatch-lock").exists()
    assert cli(gqa(source, tmp_path / "out")).code == 0
    assert contents(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]


def test_stale_lock_file_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.kvpatch-lock").write_text("pid 1 on elsewhere since the beginning\n")
    assert cli(gqa(source, tmp_path / "out")).code == 0
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_follow_the_umask(source: Path, tmp_path: Path, mask: int) -> None:
    previous = os.umask(mask)
    try:
        assert cli(gqa(source, tmp_path / "out")).code == 0
    finally:
        os.umask(previous)
    out = tmp_path / "out"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (out, *out.rglob("*"))}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in modes}
    assert len(modes) > 10

"""Runs that end early: nothing is published, and the next run continues to the same bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import kvpatch
from convert.checkpoint import staging
from tests.faults.running import (
    Run,
    SignalAfterShard,
    SignalAtDiskCall,
    cli,
    contents,
    disk_calls,
    gqa,
    names,
    run_child,
)
from tests.faults.small_llama import write_llama

Contents = dict[str, bytes | str | None]
FINISHED = 3  # shards in the journal when a run is interrupted; there are eight


def _staged(out: Path) -> Path:
    """The one staging folder of an output."""
    (folder,) = out.parent.glob(f".{out.name}.partial-*")
    return folder


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _identities(files: list[Path]) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with equal bytes."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def _interrupt(source: Path, out: Path, number: signal.Signals = signal.SIGKILL) -> Run:
    return run_child(gqa(source, out), SignalAfterShard(number, FINISHED))


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Path:
    """An output whose run was killed with three shards in the journal."""
    assert _interrupt(source, tmp_path / "out").code == -signal.SIGKILL
    return tmp_path / "out"


def test_killed_at_any_moment(
    source: Path, tmp_path: Path, expected: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth of the calls that change the disk; five is coprime to the period of a shard."""
    with monkeypatch.context() as patch:
        calls = disk_calls(patch, gqa(source, tmp_path / "counted"))
    assert len(calls) > 100
    publishing = next(n for n, call in enumerate(calls, 1) if call.startswith("rename"))
    for call in range(1, len(calls) + 1, 5):
        out = tmp_path / str(call) / "out"
        killed = run_child(gqa(source, out), SignalAtDiskCall(signal.SIGKILL, call))
        assert killed.code == -signal.SIGKILL, calls[call - 1]
        assert out.exists() == (call > publishing), calls[call - 1]
        if call <= publishing:
            assert cli(gqa(source, out)).code == 0, calls[call - 1]
            assert names(out.parent) == ["out"], calls[call - 1]
        assert contents(out) == expected, calls[call - 1]


def test_finished_shards_are_not_written_again(
    source: Path, interrupted: Path, expected: Contents
) -> None:
    assert not interrupted.exists()
    kept = _shards(_staged(interrupted))
    assert len(kept) == FINISHED
    before = _identities(kept)
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected
    assert _identities([interrupted / file.name for file in kept]) == before


def test_no_resume_writes_everything_again(
    source: Path, interrupted: Path, expected: Contents
) -> None:
    kept = _shards(_staged(interrupted))
    before = _identities(kept)
    assert cli(gqa(source, interrupted, "--no-resume")).code == 0
    assert contents(interrupted) == expected
    after = _identities([interrupted / file.name for file in kept])
    assert not set(after.values()) & set(before.values())
    assert names(interrupted.parent) == [interrupted.name]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
def test_signals_end_the_run_and_say_how_to_resume(
    source: Path, tmp_path: Path, expected: Contents, number: signal.Signals, code: int, word: str
) -> None:
    out = tmp_path / "out"
    run = _interrupt(source, out, number)
    assert (run.code, run.out) == (code, "")
    assert run.err == (
        f"error: {word}\nhint: Finished shards are kept; run the same command again to continue.\n"
    )
    assert names(tmp_path) == [_staged(out).name]  # the lock is gone
    before = _identities(_shards(_staged(out))[:FINISHED])
    assert len(before) == FINISHED
    assert cli(gqa(source, out)).code == 0
    assert contents(out) == expected
    assert _identities([out / name for name in before]) == before


def test_interrupted_before_the_first_shard_leaves_nothing(source: Path, tmp_path: Path) -> None:
    # the tenth call lies in the first shard
    assert run_child(gqa(source, tmp_path / "out"), SignalAtDiskCall(signal.SIGINT, 10)).code == 130
    assert not contents(tmp_path)


def _cut(count: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:count]


def _flip(at: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        place = int(at * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return damage


@pytest.mark.parametrize(
    "damage",
    [_cut(0), _cut(1000), _cut(-1), lambda data: data + b"\0", _flip(0), _flip(0.5), _flip(1)],
    ids=["empty", "truncated", "a-byte-short", "a-byte-long", "first-bit", "middle-bit", "last"],
)
def test_damaged_shard_is_written_again(
    source: Path, interrupted: Path, expected: Contents, damage: Callable[[bytes], bytes]
) -> None:
    first, second, third = _shards(_staged(interrupted))
    second.write_bytes(damage(second.read_bytes()))
    before = _identities([first, second, third])
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected
    after = _identities([interrupted / name for name in before])
    assert [name for name in before if before[name] != after[name]] == [second.name]


def test_lost_shard_is_written_again(source: Path, interrupted: Path, expected: Contents) -> None:
    _shards(_staged(interrupted))[1].unlink()
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected


def test_foreign_files_in_the_staging_folder_are_not_published(
    source: Path, interrupted: Path, expected: Contents
) -> None:
    folder = _staged(interrupted)
    (folder / ".tmp-config.json").write_text("{")
    (folder / "model-00099-of-00099.safetensors").write_text("stray")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("stray")
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected


def _journal(out: Path) -> Path:
    return _staged(out) / ".journal.jsonl"


@pytest.mark.parametrize(
    "kept", [0, 1, 40, -1], ids=["nothing", "one-byte", "forty-bytes", "all-but-newline"]
)
def test_torn_last_line_costs_one_shard(
    source: Path, interrupted: Path, expected: Contents, kept: int
) -> None:
    """Torn at any byte, the line counts for nothing, and the lines written next stay readable."""
    *whole, last = _journal(interrupted).read_bytes().splitlines(keepends=True)
    _journal(interrupted).write_bytes(b"".join(whole) + last[:kept])
    files = _shards(_staged(interrupted))
    again = run_child(gqa(source, interrupted), SignalAfterShard(signal.SIGKILL, FINISHED + 1))
    assert again.code == -signal.SIGKILL
    now = _shards(_staged(interrupted))
    before = _identities(now)
    assert [file.name for file in now[: len(files)]] == [file.name for file in files]
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected
    assert _identities([interrupted / file.name for file in now]) == before


@pytest.mark.parametrize(
    "content", [None, b"", b'{"for', b"\xff\xfe\n"], ids=["none", "empty", "torn", "noise"]
)
def test_journal_without_a_head_starts_afresh_and_stays_resumable(
    source: Path, interrupted: Path, expected: Contents, content: bytes | None
) -> None:
    if content is None:
        _journal(interrupted).unlink()
    else:
        _journal(interrupted).write_bytes(content)
    assert _interrupt(source, interrupted).code == -signal.SIGKILL
    kept = _shards(_staged(interrupted))[:FINISHED]
    before = _identities(kept)
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected
    assert _identities([interrupted / file.name for file in kept]) == before


def test_noise_in_the_journal_costs_one_shard(
    source: Path, interrupted: Path, expected: Contents
) -> None:
    lines = _journal(interrupted).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:30] + b"\0\0\0\0" + lines[2][34:]
    _journal(interrupted).write_bytes(b"".join(lines))
    files = _shards(_staged(interrupted))
    before = _identities(files)
    assert cli(gqa(source, interrupted)).code == 0
    assert contents(interrupted) == expected
    after = _identities([interrupted / name for name in before])
    assert [name for name in before if before[name] != after[name]] == [files[1].name]


@pytest.mark.parametrize(
    ("key", "value"), [("kvpatch", "0.0.7"), ("format", 99)], ids=["tool", "format"]
)
def test_journal_of_another_version_is_refused_by_name(
    source: Path, interrupted: Path, expected: Contents, key: str, value: str | int
) -> None:
    head, *shards = _journal(interrupted).read_bytes().splitlines(keepends=True)
    changed = json.loads(head) | {key: value}
    _journal(interrupted).write_bytes(json.dumps(changed).encode() + b"\n" + b"".join(shards))
    before = contents(interrupted.parent)
    run = cli(gqa(source, interrupted))
    assert run.code == 7
    ours = {"kvpatch": kvpatch.__version__, "format": staging._FORMAT}[key]
    assert str(value) in run.err
    assert str(ours) in run.err
    assert "--no-resume" in run.err
    found = contents(interrupted.parent)
    assert {k: v for k, v in found.items() if k != ".out.kvpatch-lock"} == {
        k: v for k, v in before.items() if k != ".out.kvpatch-lock"
    }
    assert cli(gqa(source, interrupted, "--no-resume")).code == 0
    assert contents(interrupted) == expected


@pytest.mark.parametrize(
    "flags", [("--merge", "first"), ("--dtype", "float32")], ids=["merge", "dtype"]
)
def test_work_of_another_conversion_is_named_and_left_alone(
    source: Path, interrupted: Path, flags: tuple[str, ...]
) -> None:
    other = _staged(interrupted)
    before = contents(other)
    run = cli(gqa(source, interrupted, *flags))
    assert run.code == 0
    assert str(other) in run.err
    assert contents(other) == before
    clean = interrupted.with_name("clean")
    assert cli(gqa(source, clean, *flags)).code == 0
    assert contents(interrupted) == contents(clean)


def test_changed_source_is_not_mixed_with_finished_shards(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_llama(source)
    assert _interrupt(source, out).code == -signal.SIGKILL
    old = write_llama(tmp_path / "other", seed=1)
    for file in _shards(old):
        (source / file.name).write_bytes(file.read_bytes())
    assert cli(gqa(source, out)).code == 0
    assert cli(gqa(source, tmp_path / "clean")).code == 0
    assert contents(out) == contents(tmp_path / "clean")

"""What is not there on every system: affinity, preadv, long reads, signals of POSIX."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from convert import resources
from convert.checkpoint import reader
from convert.signals import ending_soon
from tests.families.texts import random_text, write_tokenizer
from tests.faults.running import cli, contents, gqa, names
from tests.faults.small_llama import write_llama


@pytest.mark.parametrize(
    ("affinity", "counted", "expected"),
    [({0, 2, 5}, 8, 3), (None, 8, 8), (None, None, 1)],
    ids=["affinity", "count", "unknown"],
)
def test_cores(
    monkeypatch: pytest.MonkeyPatch, affinity: set[int] | None, counted: int | None, expected: int
) -> None:
    if affinity is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert resources.available_cores() == expected


def test_calibration_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = write_llama(tmp_path / "model", vocab=97), tmp_path / "text.txt"
    write_tokenizer(source)
    text.write_text(random_text(100, seed=0))
    how = ["--merge", "svd", "--calibration", str(text), "--samples", "4", "--context", "16"]
    assert cli(gqa(source, tmp_path / "with", *how)).code == 0
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cli(gqa(source, tmp_path / "without", *how)).code == 0
    assert contents(tmp_path / "without") == contents(tmp_path / "with")


def test_windows_is_refused_with_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    run = cli(gqa(source, tmp_path / "out"))
    assert run.code == 2
    assert run.err.startswith("error: only Linux and macOS are supported")
    assert "WSL" in run.err
    assert names(tmp_path) == []


def test_signals_are_left_alone_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.setattr(sys, "platform", "win32")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with ending_soon():
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_no_call_reads_more_than_macos_allows(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes | str | None],
) -> None:
    assert reader._MOST_BYTES < 1 << 31
    preadv, most = os.preadv, 1000

    def strict(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert sum(map(len, buffers)) <= most
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(reader, "_MOST_BYTES", most)
    monkeypatch.setattr(os, "preadv", strict)
    assert cli(gqa(source, tmp_path / "out")).code == 0
    assert contents(tmp_path / "out") == expected

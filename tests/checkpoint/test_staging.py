"""The staging folder on its own: journal, lock, publication and the order of its flushes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from convert.checkpoint.staging import MANIFEST, Staging
from convert.checkpoint.writer import FileRecord, copy_file, write_file
from kvpatch.errors import OutputError

PLAN, OTHER = "a" * 64, "b" * 64
RESULTS = [{"layer": 0, "kv_heads": [8, 2], "lost_energy_k": 0.1 + 0.2}]


def _stage(out: Path, plan: str = PLAN, *, resume: bool = True, overwrite: bool = False) -> Staging:
    return Staging(out, plan, resume=resume, overwrite=overwrite)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _shard(staging: Staging, name: str = "model.safetensors", content: bytes = b"x") -> None:
    staging.record(name, write_file(staging.path / name, content), RESULTS)


def test_published_result_is_all_that_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _stage(out) as staging:
        assert staging.path.parent == out.parent  # same file system, so that a rename will do
        _shard(staging)
        assert not out.exists()
        staging.publish()
    assert _names(tmp_path) == ["out"]
    assert _names(out) == ["model.safetensors"]


def _path(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def test_everything_is_on_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power loss may not undo: each file and each folder that holds one is flushed."""
    flushed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched(descriptor: int) -> None:
        flushed.append(_path(descriptor).replace("/.tmp-", "/"))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        everything = {old, *old.rglob("*")}
        assert {str(path) for path in everything} <= set(flushed)
        flushed.clear()
        rename(old, new)

    out = tmp_path / "out"
    source = tmp_path / "tool.jinja"
    source.write_text("template")
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "rename", renamed)
    with _stage(out) as staging:
        _shard(staging)
        copy_file(source, staging.path / "additional_chat_templates" / "tool.jinja")
        staging.publish()
    assert flushed == [str(tmp_path)]


def test_journal_lines_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    with _stage(tmp_path / "out") as staging:
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size)
        )
        staging.record("model.safetensors", FileRecord(1, "0" * 64), RESULTS)
        assert sizes == [(staging.path / ".journal.jsonl").stat().st_size]


def _interrupted(staging: Staging, *, finished: bool) -> None:
    with staging:
        if finished:
            _shard(staging)
        write_file(staging.path / "unfinished", b"y")
        raise KeyboardInterrupt


def test_interrupted_work_is_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = _stage(out)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(staging, finished=True)
    assert _names(tmp_path) == [staging.path.name]
    with _stage(out) as again:
        record = FileRecord(1, hashlib.sha256(b"x").hexdigest())
        assert again.finished == {"model.safetensors": (record, RESULTS)}
        assert _names(again.path) == [".journal.jsonl", "model.safetensors"]
        again.publish()


def test_other_plan_does_not_find_it(tmp_path: Path) -> None:
    with _stage(tmp_path / "out") as staging:
        _shard(staging)
    with _stage(tmp_path / "out", OTHER) as other:
        assert not other.finished
        assert other.leftovers == [staging.path]
    assert (staging.path / "model.safetensors").exists()


def test_no_resume_discards_it(tmp_path: Path) -> None:
    with _stage(tmp_path / "out") as staging:
        _shard(staging)
    with _stage(tmp_path / "out", resume=False) as again:
        assert not again.finished
        assert _names(again.path) == [".journal.jsonl"]


def test_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(_stage(tmp_path / "out"), finished=False)
    assert not _names(tmp_path)


def test_second_holder_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _stage(out) as staging:
        _shard(staging)
        with pytest.raises(OutputError, match=f"pid {os.getpid()} on "):
            _stage(out, OTHER, resume=False).__enter__()
        assert staging.path.is_dir()
        with _stage(tmp_path / "elsewhere"):
            pass
        staging.publish()
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["plain", "overwrite"])
def test_published_over_an_earlier_result_only_on_demand(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    with _stage(out, overwrite=overwrite) as staging:
        _shard(staging)
        if overwrite:
            staging.publish()
        else:
            with pytest.raises(OutputError, match=str(out)):
                staging.publish()
    assert _names(out) == (["model.safetensors"] if overwrite else [MANIFEST])
    assert staging.path.exists() != overwrite  # refused work is kept


def test_refused_publication_can_be_resumed(tmp_path: Path) -> None:
    """What was finished counts as finished after the obstacle is gone."""
    out = tmp_path / "out"
    with _stage(out) as staging:
        _shard(staging)
        out.mkdir()
        (out / "obstacle").touch()
        with pytest.raises(OutputError):
            staging.publish()
    (out / "obstacle").unlink()
    with _stage(out) as again:
        assert again.finished
        again.publish()
    assert _names(out) == ["model.safetensors"]


def test_swap_that_was_cut_in_two_is_healed(tmp_path: Path) -> None:
    """The earlier result was set aside, the new one not yet put in its place."""
    aside = tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / MANIFEST).write_text("{}")
    with _stage(tmp_path / "out"):
        assert _names(tmp_path / "out") == [MANIFEST]
    assert _names(tmp_path) == ["out"]


def test_swap_that_was_cut_before_its_end_is_finished(tmp_path: Path) -> None:
    for name in ("out", ".out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(name)
    with _stage(tmp_path / "out"):
        pass
    assert _names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MANIFEST).read_text() == "out"

"""Sources in odd places, and sources that change or vanish while they are read."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import convert.pipeline
from convert.recipe import make_recipe
from kvpatch.errors import InputModelError
from tests.faults.builders import (
    assert_refused,
    llama_tensors,
    run_gqa,
    write_model,
    write_shards,
)
from tests.faults.running import cli, contents

WEIGHTS = "model.safetensors"


def convert_while(source: Path, out: Path, act: Callable[[], None], **keys: object) -> None:
    """Convert, and call ``act`` once, when the first bytes have been written."""
    pending = [act]

    def progress(stage: str, amount: int, total: int) -> None:
        if pending:
            pending.pop()()

    values = {"method": "gqa", "kv_heads": 2, "source": str(source), "output": str(out), **keys}
    convert.pipeline.convert(make_recipe(values), progress=progress)


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, 600),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "touched": lambda file: os.utime(file, (1, 1)),
    "deleted": lambda file: file.unlink(),
    "replaced": lambda file: (file.parent / "config.json").rename(file),
}


@pytest.mark.parametrize("change", CHANGES)
def test_source_changes_during_the_run(tmp_path: Path, change: str) -> None:
    source, work = write_model(tmp_path / "model"), tmp_path / "work"
    with pytest.raises(InputModelError) as caught:
        convert_while(source, work / "out", lambda: CHANGES[change](source / WEIGHTS))
    assert WEIGHTS in caught.value.message
    assert list(work.iterdir()) == [], "output, staging folder or lock is left"


@pytest.mark.parametrize("change", ["truncated", "deleted"])
def test_later_shard_changes_during_the_run(tmp_path: Path, change: str) -> None:
    source, out = write_shards(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(InputModelError, match=r"b\.safetensors"):
        convert_while(
            source,
            out,
            lambda: CHANGES[change](source / "b.safetensors"),
            max_shard_size="500B",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shard_made_from_a_changing_source_is_not_resumed(tmp_path: Path) -> None:
    # the source is written to during the run and then put back with its old times, as rsync does
    source, out, fresh = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "fresh"
    assert run_gqa(source, fresh).code == 0
    file = source / WEIGHTS
    content, stat = file.read_bytes(), file.stat()
    with pytest.raises(InputModelError, match="changed"):
        convert_while(source, out, lambda: overwrite(file, len(content) - 2000, bytes(2000)))
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_gqa(source, out).code == 0
    assert contents(out) == contents(fresh)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def preadv(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    source = write_model(tmp_path / "model")
    monkeypatch.setattr(os, "preadv", preadv)
    assert_refused(source, WEIGHTS, os.strerror(code))


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, preadv = write_model(tmp_path / "model"), os.preadv
    assert run_gqa(source, tmp_path / "whole").code == 0
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:13]], at))
    assert run_gqa(source, tmp_path / "short").code == 0
    assert contents(tmp_path / "short") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "modèle-模型-🦙",
        "-dash",
        "[bold]rich",
        "it's",
        "x" * 200,
        "percent%20",
        "a;b&c",
    ],
)
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    source, out = write_model(tmp_path / name), tmp_path / f"{name[:100]} out"
    plan = run_gqa(source, out, "--dry-run")
    assert plan.code == 0, plan.err
    # a table cell may be folded over lines
    assert name.replace(" ", "") in plan.out.replace("\n", "").replace(" ", "")
    run = run_gqa(source, out)
    assert (run.code, run.out) == (0, f"{out}\n"), run.err
    assert cli(["verify", str(out), "--files-only"]).code == 0


def test_markup_in_the_output_path_is_text(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (tmp_path / "a[").mkdir()
    run = run_gqa(source, tmp_path / "a[" / "bold]", "--dry-run")  # .../a[/bold]
    assert run.code == 0, run.err
    assert "a[/bold]" in run.out.replace("\n", "")


def test_deep_path(tmp_path: Path) -> None:
    source = write_model(tmp_path.joinpath(*["d" * 50] * 20) / "model")
    assert run_gqa(source, tmp_path / "out").code == 0


def test_read_only_source(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    before = contents(source)
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert run_gqa(source, tmp_path / "out").code == 0
        assert contents(source) == before
    finally:
        source.chmod(0o755)
    assert all(os.access(path, os.W_OK) for path in (tmp_path / "out").iterdir())
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").iterdir())


def hub_cache(folder: Path) -> Path:
    """A checkpoint in the layout of the Hub's cache: a snapshot of links into ``blobs``."""
    plain = write_model(folder / "plain")
    repository = folder / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a1" * 20)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in plain.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_hub_cache_of_links(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert run_gqa(snapshot, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/name" in card


def test_hub_cache_on_another_disk_by_a_link(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    through = tmp_path / "cache" / snapshot.relative_to(tmp_path / "hub")
    assert run_gqa(through, tmp_path / "out").code == 0


def test_link_to_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(hub_cache(tmp_path))
    run = run_gqa(tmp_path / "model", tmp_path / "out")
    assert run.code == 0, run.err


def test_link_out_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    secret = tmp_path / "secret"
    (snapshot / WEIGHTS).resolve().rename(secret)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(secret)
    assert_refused(snapshot, f"{WEIGHTS} is a link that leaves the checkpoint", str(secret))


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md"])
def test_side_file_that_is_a_link_out_of_the_source(tmp_path: Path, name: str) -> None:
    source, secret = write_model(tmp_path / "model"), tmp_path / "secret"
    secret.write_text("---\nlicense: secret\n---\n")
    (source / name).symlink_to(secret)
    assert_refused(source, f"{name} is a link that leaves the checkpoint", str(secret))


@pytest.mark.parametrize(
    "front_matter",
    [
        "license: 2024-01-01",
        "license: !!binary aGk=",
        "license: &a [*a]",
        "language: {1: a, b: 2}",
        "license: .nan",
        "license: [" + "[" * 5000,
        "license: *missing",
        "- list",
        "\x00",
    ],
    ids=lambda text: text[:20],
)
def test_front_matter_of_the_card_cannot_stop_a_conversion(
    tmp_path: Path, front_matter: str
) -> None:
    source = write_model(tmp_path / "model")
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n# Card\n")
    run = run_gqa(source, tmp_path / "out")
    assert run.code == 0, run.err
    assert "warning: no licence or language is taken over" in run.err


@pytest.mark.timeout(10)
def test_alias_bomb_in_the_front_matter(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    lines = ["a0: &a0 [x, x]", *levels, "license: *a29"]
    (source / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    run = run_gqa(source, tmp_path / "out")
    assert run.code == 0, run.err
    assert "warning: no licence or language is taken over" in run.err


def test_licence_and_languages_are_taken_over(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, fr]\nx: 1\n---\n")
    assert run_gqa(source, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "- fr" in card


@pytest.mark.parametrize("kind", ["file", "nothing", "empty"])
def test_source_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "model"
    if kind == "file":
        source.write_text("no folder")
    elif kind == "empty":
        source.mkdir()
    run = run_gqa(source, tmp_path / "out")
    assert run.code == 3
    assert str(source) in run.err
    assert not (tmp_path / "out").exists()


def test_untouched_tensors_are_the_bytes_of_the_source(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    assert run_gqa(source, tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in llama_tensors().items():
        if "k_proj" not in name and "v_proj" not in name:
            assert written[name].equal(tensor), name

"""Disk, memory and number ranges that do not suffice: refused or stopped, nothing published."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import resources
from tests.faults.running import (
    DiskFull,
    SignalAfterShard,
    cli,
    contents,
    gqa,
    names,
    peak_memory,
    run_child,
)
from tests.faults.small_llama import HEADS, write_llama
from tests.helpers import assert_equal, load_folder

Contents = dict[str, bytes | str | None]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


# Disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_disk_fills_up_in_a_shard(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        DiskFull(patch, 100_000, code)
        run = cli(gqa(source, out))
    assert run.code == 4
    assert run.err.startswith(f"error: {os.strerror(code)} while writing ")
    assert ".safetensors\nhint: Finished shards are kept." in run.err
    (staging,) = tmp_path.iterdir()  # neither output nor lock
    assert (
        0 < len(list(staging.glob("*.safetensors"))) < len(list(undisturbed.glob("*.safetensors")))
    )
    assert cli(gqa(source, out)).code == 0
    assert contents(out) == contents(undisturbed)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("call", range(1, 26, 3))
def test_disk_fills_up_at_a_flush(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """File systems that allocate late, and NFS, report a full disk at fsync."""
    fsync, left = os.fsync, iter(range(call))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli(gqa(source, out)).code == 4
    assert not out.exists()
    assert cli(gqa(source, out)).code == 0
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize("limit", [1, 30, 2_000, 30_000, 37_500])
def test_files_may_not_grow(source: Path, tmp_path: Path, undisturbed: Path, limit: int) -> None:
    """A real limit of the kernel, from the lock file on to the largest shard."""
    out = tmp_path / "out"
    run = run_child(
        gqa(source, out), partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert run.code == 4
    assert os.strerror(errno.EFBIG) in run.err
    assert not out.exists()
    assert cli(gqa(source, out)).code == 0
    assert contents(out) == contents(undisturbed)


def test_no_room_for_the_staging_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without a single free block or inode."""

    def full(path: Path, mode: int = 0o777) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        assert cli(gqa(source, tmp_path / "out")).code == 4
    assert not contents(tmp_path)


def test_short_writes_are_continued(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:777]))
        assert cli(gqa(source, tmp_path / "out")).code == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def _free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))


def _tensor_bytes(folder: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(folder).values())


@pytest.mark.parametrize("enough", [False, True], ids=["too-little", "enough"])
def test_free_disk_is_checked_before_writing(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    needed = _tensor_bytes(undisturbed) * 1.05
    _free(monkeypatch, int(needed) + enough)
    run = cli(gqa(source, tmp_path / "out"))
    assert run.code == (0 if enough else 4)
    if not enough:
        assert re.search(r"needs \S+ \S+ on disk, \S+ \S+ are free at " + str(tmp_path), run.err)
        assert not contents(tmp_path)


def test_resuming_needs_room_for_the_rest_only(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run_child(gqa(source, out), SignalAfterShard(signal.SIGKILL, 6)).code < 0
    _free(monkeypatch, _tensor_bytes(undisturbed) // 2)
    assert cli(gqa(source, out, "--no-resume")).code == 4
    assert run_child(gqa(source, out), SignalAfterShard(signal.SIGKILL, 6)).code < 0
    assert cli(gqa(source, out)).code == 0


# Memory


def test_not_enough_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_ram", lambda: 50_000_000)
    run = cli(gqa(source, tmp_path / "out"))
    assert run.code == 4
    assert "needs " in run.err
    assert "are free" in run.err
    assert not contents(tmp_path)


def test_max_ram_names_the_size_that_is_enough(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = cli(gqa(source, out, "--max-ram", "1MB"))
    assert refused.code == 4
    match = re.search(r"--max-ram (\d+)MB is enough", refused.err)
    assert match is not None
    assert not contents(tmp_path)
    assert cli(gqa(source, out, "--max-ram", f"{int(match[1]) - 1}MB")).code == 4
    assert cli(gqa(source, out, "--max-ram", f"{match[1]}MB")).code == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [("600000000\n", 500_000_000), ("max\n", None), ("90000000\n", 0)]
)
def test_memory_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    files = tmp_path / "memory.max", tmp_path / "memory.current"
    for file, content in zip(files, (limit, "100000000\n"), strict=True):
        file.write_text(content)
    machine = 10**12
    monkeypatch.setattr(
        resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=machine)
    )
    monkeypatch.setattr(resources, "_CGROUP", (files,))
    assert resources.available_ram() == (machine if expected is None else expected)


def test_file_cache_of_a_container_is_not_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "memory.max", tmp_path / "memory.current"
    for file, content in zip(files, ("8000000000", "7900000000"), strict=True):
        file.write_text(content)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 7000000000\n")
    monkeypatch.setattr(
        resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12)
    )
    monkeypatch.setattr(resources, "_CGROUP", (files,))
    assert resources.available_ram() == 7_100_000_000


@pytest.mark.slow
def test_peak_memory_keeps_to_the_plan_and_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A layer more must not cost memory; what one holds is 68 MB, its keys and values 17 MB."""
    peaks = []
    for layers in (2, 6):
        source = write_llama(
            tmp_path / f"source-{layers}", layers=layers, hidden=2048, inner=2816, vocab=512
        )
        arguments = ["gqa", str(source), str(tmp_path / f"out-{layers}"), "--kv-heads", "2"]
        plan = cli([*arguments, "--dry-run", "--json"])
        runs = [peak_memory([*arguments, "--overwrite"]) for _ in range(2)]
        assert max(runs) < json.loads(plan.out)["peak_ram"]
        peaks.append(min(runs))
        shutil.rmtree(source)
    # kept keys and values of four layers would be 67 MB; equal runs differ by up to 7 MB alone, and
    # by 30 MB beside other work, when buffers wait for one another
    assert peaks[1] - peaks[0] < 45_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--dtype", "float16"], ["--dtype", "float32"], ["--merge", "svd"]],
    ids=["narrow_cast", "wide_cast", "svd"],
)
def test_peak_memory_keeps_to_the_plan_of_every_way(tmp_path: Path, flags: list[str]) -> None:
    source = write_llama(tmp_path / "source", layers=1, hidden=4096, inner=512, vocab=512)
    arguments = ["gqa", str(source), str(tmp_path / "out"), "--kv-heads", "2", *flags]
    plan = cli([*arguments, "--dry-run", "--json"])
    assert peak_memory(arguments) < json.loads(plan.out)["peak_ram"]


# Range of numbers


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.3.self_attn.v_proj.weight",
    ],
    ids=["first-file", "copied", "pooled"],
)
def test_overflow_in_float16(source: Path, tmp_path: Path, name: str) -> None:
    """70000 is a sound bfloat16 number; the largest of float16 is 65504."""
    copy = shutil.copytree(source, tmp_path / "source")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name].fill_(70_000.0)
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "work" / "out"
    run = cli(gqa(copy, out, "--dtype", "float16"))
    assert run.code == 6
    assert f"'{name}' overflows in float16" in run.err
    assert "--dtype bfloat16" in run.err
    assert not out.exists()
    assert cli(gqa(copy, out, "--dtype", "bfloat16")).code == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_equals_a_cast_by_torch(tmp_path: Path, dtype: str) -> None:
    source = write_llama(tmp_path / "source", dtype=torch.float32)
    assert cli(gqa(source, tmp_path / "out", "--dtype", dtype)).code == 0
    before, after = _tensors(source), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor
        if "k_proj" in name or "v_proj" in name:  # mean in float64, rounded to the source's dtype
            heads = tensor.view(2, HEADS // 2, -1, tensor.shape[1])
            expected = heads.double().mean(1).float().flatten(0, 1)
        assert_equal(after[name], expected.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


# Shards


def test_shards_are_those_of_transformers(undisturbed: Path, tmp_path: Path) -> None:
    """Names, sizes and index as ``save_pretrained`` writes them, and the stock class loads them."""
    model = load_folder(undisturbed, torch.bfloat16)
    loaded = model.state_dict()
    for name, tensor in _tensors(undisturbed).items():
        assert_equal(loaded[name], tensor)
    model.save_pretrained(tmp_path / "reference", max_shard_size="40KB")
    index, reference = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (undisturbed, tmp_path / "reference")
    )
    assert index["metadata"] == reference["metadata"]
    assert index["weight_map"].keys() == reference["weight_map"].keys()
    files = sorted(file.name for file in undisturbed.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) == 8
    assert files == [f"model-{n:05d}-of-00008.safetensors" for n in range(1, 9)]
    pattern = r"model-\d{5}-of-\d{5}\.safetensors"
    assert all(re.fullmatch(pattern, name) for name in reference["weight_map"].values())
    for file in files:
        held = load_file(undisturbed / file)
        assert held.keys() == {n for n, where in index["weight_map"].items() if where == file}
        assert sum(t.numel() * t.element_size() for t in held.values()) <= 40_000


def test_one_shard_has_no_index(source: Path, tmp_path: Path) -> None:
    assert cli(["mqa", str(source), str(tmp_path / "out")]).code == 0
    names = {path.name for path in (tmp_path / "out").glob("model*")}
    assert names == {"model.safetensors"}
    load_folder(tmp_path / "out", torch.bfloat16)

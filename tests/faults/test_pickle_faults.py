"""Pickled weights: refused by default, read without running code, never trusted for their size."""

from __future__ import annotations

import contextlib
import io
import os
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convert.checkpoint.pickle_shard import read_pickle
from kvpatch.errors import InputModelError
from tests.faults.builders import (
    CONFIG,
    assert_refused,
    attention,
    llama_tensors,
    run_gqa,
    write_json,
    write_model,
)
from tests.faults.running import run_child

ALLOW = ["--allow-pickle"]
BIN = "pytorch_model.bin"


def write_pickled(folder: Path, state: object | None = None, **options: Any) -> Path:
    """Write a checkpoint whose weights are in ``pytorch_model.bin``."""
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    torch.save(llama_tensors() if state is None else state, folder / BIN, **options)
    return folder


def with_extra(tensor: object) -> dict[str, object]:
    return {**llama_tensors(), "extra": tensor}


def test_refused_without_the_flag(tmp_path: Path) -> None:
    model = write_pickled(tmp_path / "model")
    assert_refused(model, "pickled", "can run code", "--allow-pickle", "safetensors")


def test_safetensors_are_preferred_where_there_are_both(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / BIN).write_bytes(b"not even a pickle")
    assert run_gqa(model, tmp_path / "out").code == 0


def test_gives_what_safetensors_give(tmp_path: Path) -> None:
    pickled = write_pickled(tmp_path / "pickled")
    plain = write_model(tmp_path / "plain")
    assert run_gqa(pickled, tmp_path / "a", *ALLOW).code == 0
    assert run_gqa(plain, tmp_path / "b").code == 0
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_format_before_torch_1_6_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = write_pickled(tmp_path / "model", _use_new_zipfile_serialization=False)
    assert_refused(model, BIN, "before 1.6", "save it once with a newer torch", flags=ALLOW)


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_json(model / "config.json", CONFIG)
    tensors = llama_tensors()
    weight_map = {name: f"{'b' if 'layers.1' in name else 'a'}.bin" for name in tensors}
    for file in ("a.bin", "b.bin"):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, model / file)
    write_json(model / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert run_gqa(model, tmp_path / "out", *ALLOW).code == 0
    weight_map["lm_head.weight"] = "../c.bin"
    write_json(model / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert_refused(model, "'../c.bin'", "outside", flags=ALLOW)


@pytest.mark.parametrize(
    "tensor",
    [torch.nn.Parameter(torch.ones(8)), torch.arange(12.0)[3:11]],
    ids=["parameter", "slice"],
)
def test_unusual_but_dense_tensors_are_copied(tmp_path: Path, tensor: Tensor) -> None:
    name = "model.norm.weight"
    model = write_pickled(tmp_path / "model", {**llama_tensors(), name: tensor})
    run = run_gqa(model, tmp_path / "out", *ALLOW)
    assert run.code == 0, run.err
    assert load_file(tmp_path / "out" / "model.safetensors")[name].equal(tensor.detach())


@dataclass
class Payload:
    """Creates a file when it is unpickled by a loader that runs code."""

    trap: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_torch_1.6"])
@pytest.mark.parametrize("nested", [True, False], ids=["as_entry", "as_whole"])
def test_malicious_pickle_does_not_run(tmp_path: Path, zipped: bool, nested: bool) -> None:
    payload = Payload(tmp_path / "ran")
    state = with_extra(payload) if nested else payload
    model = write_pickled(tmp_path / "model", state, _use_new_zipfile_serialization=zipped)
    facts = ("run code", "refused") if zipped else ("before 1.6",)
    assert_refused(model, BIN, *facts, flags=ALLOW)
    assert not payload.trap.exists()
    torch.load(model / BIN, weights_only=False)
    assert payload.trap.is_dir(), "the payload is a dud and the test shows nothing"


@pytest.mark.parametrize(
    ("state", "facts"),
    [
        ([1, 2], ("holds a list", "not a state dict")),
        (torch.ones(3), ("holds a Tensor", "not a state dict")),
        ({"state_dict": llama_tensors()}, ("entry 'state_dict'", "dense contiguous tensor")),
        ({7: torch.ones(3)}, ("entry 7", "dense contiguous tensor")),
        ({"x": 7}, ("entry 'x'", "dense contiguous tensor")),
        (with_extra(torch.eye(3).to_sparse()), ("entry 'extra'", "dense contiguous tensor")),
        (with_extra(torch.empty(3, device="meta")), ("entry 'extra'", "dense contiguous tensor")),
        (with_extra(torch.ones(2, 3).t()), ("entry 'extra'", "dense contiguous tensor")),
        (with_extra(torch.ones(3, dtype=torch.complex64)), ("torch.complex64",)),
    ],
    ids=[
        "list",
        "tensor",
        "nested",
        "integer_name",
        "number",
        "sparse",
        "meta",
        "strided",
        "complex",
    ],
)
def test_content_is_no_state_dict(tmp_path: Path, state: object, facts: tuple[str, ...]) -> None:
    assert_refused(write_pickled(tmp_path / "model", state), *facts, flags=ALLOW)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_rows(tmp_path: Path) -> None:
    model = write_pickled(tmp_path / "model", with_extra(torch.eye(3).to_sparse_csr()))
    assert_refused(model, BIN, "cannot be read", flags=ALLOW)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ("damaged",)),
        (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer", "git lfs pull")),
        (b"<!DOCTYPE html><html></html>", ("an HTML page", "download")),
    ],
    ids=["empty", "lfs_pointer", "html"],
)
def test_file_is_no_pickle(tmp_path: Path, content: bytes, facts: tuple[str, ...]) -> None:
    model = write_pickled(tmp_path / "model")
    (model / BIN).write_bytes(content)
    assert_refused(model, BIN, *facts, flags=ALLOW)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    model = write_pickled(tmp_path / "model")
    content = (model / BIN).read_bytes()
    (model / BIN).write_bytes(content[: int(share * len(content))])
    assert_refused(model, BIN, "damaged", "Download it again", flags=ALLOW)


def test_giant_of_stride_zero(tmp_path: Path) -> None:
    giant = torch.zeros(1).expand(10**9)
    model = write_pickled(tmp_path / "model", with_extra(giant))
    assert_refused(model, "'extra'", "dense contiguous tensor", flags=ALLOW)


def test_zip_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_pickled(tmp_path / "model", with_extra(torch.zeros(4_000_000)))
    with zipfile.ZipFile(io.BytesIO((model / BIN).read_bytes())) as sound:
        entries = {info.filename: sound.read(info) for info in sound.infolist()}
    with zipfile.ZipFile(model / BIN, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content)
    assert (model / BIN).stat().st_size < 100_000, "16 MB of zeros shrink to a hundredth"

    def inflate(*_: Any, **__: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch, "load", inflate)
    assert_refused(model, BIN, "compressed", flags=ALLOW)


def test_tensor_that_reaches_beyond_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_pickled(tmp_path / "model")
    size = (model / BIN).stat().st_size
    load = torch.load

    def shifted(*arguments: Any, **options: Any) -> Any:
        state = load(*arguments, **options)
        state["lm_head.weight"].untyped_storage()._checkpoint_offset = size - 8
        return state

    monkeypatch.setattr(torch, "load", shifted)
    assert_refused(model, "'lm_head.weight'", f"the file has {size:,}", flags=ALLOW)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about protocols it does not know
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_torch_1.6"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, zipped: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
    generator, file = random.Random(0), tmp_path / "model.bin"
    for _ in range(300):
        content = bytearray(buffer.getvalue())
        for _ in range(3):
            content[generator.randrange(len(content))] = generator.randrange(256)
        file.write_bytes(content)
        with contextlib.suppress(InputModelError):
            read_pickle(file, file.name)


@pytest.mark.parametrize("part", ["k", "v"])
def test_nonfinite_key_or_value(tmp_path: Path, part: str) -> None:
    tensors = llama_tensors()
    tensors[attention(0, part)][2, 1] = float("nan")
    model = write_pickled(tmp_path / "model", tensors)
    assert_refused(model, attention(0, part), "first at [2, 1]", flags=ALLOW)


@dataclass(frozen=True)
class TruncateOnProgress:
    """Cuts a file off when the run has written its first bytes."""

    file: Path

    def __call__(self) -> None:
        from convert import pipeline

        original = pipeline.execute

        def execute(*args: Any, **options: Any) -> Any:
            os.truncate(self.file, 100)
            return original(*args, **options)

        pipeline.execute = execute


def test_truncated_during_the_run_is_no_crash(tmp_path: Path) -> None:
    # in a child: reading a map of a file that has shrunk kills the process with SIGBUS
    model = write_pickled(tmp_path / "model", with_extra(torch.ones(100_000)))
    out = tmp_path / "work" / "out"
    arguments = ["gqa", str(model), str(out), "--kv-heads", "2", *ALLOW]
    run = run_child(arguments, TruncateOnProgress(model / BIN))
    assert run.code == 3, run
    assert BIN in run.err
    assert list(out.parent.iterdir()) == []

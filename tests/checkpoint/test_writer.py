"""The shard writer against safetensors itself, and small files."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from convert.checkpoint.safetensors_header import tensor_bytes
from convert.checkpoint.writer import FileRecord, ShardWriter, copy_file, write_file
from kvpatch.errors import ResourceError
from tests.helpers import assert_equal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def _write(path: Path, tensors: dict[str, torch.Tensor], pieces: int = 1) -> FileRecord:
    header = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(path, header) as writer:
        for tensor in tensors.values():
            data = tensor_bytes(tensor)
            step = max(1, -(-len(data) // pieces))
            for start in range(0, len(data), step):
                writer.write(data[start : start + step])
        return writer.finish()


def _record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5
    ),
    pieces=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[torch.dtype, list[int]]],
    pieces: int,
) -> None:
    """Any dtypes and shapes, scalars and empty ones too, in any number of pieces."""
    path = tmp_path_factory.mktemp("writer") / "x.safetensors"
    tensors = {
        f"tensor {i} é": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    assert _write(path, tensors, pieces) == _record(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    _write(tmp_path / "1", tensors, pieces=1)
    _write(tmp_path / "2", tensors, pieces=3)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_data_begins_aligned(tmp_path: Path) -> None:
    """Readers map the file: the length of the header is a multiple of eight, whatever the name."""
    for length in range(1, 10):
        path = tmp_path / str(length)
        _write(path, {"n" * length: torch.ones(1)})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_buffer_may_be_reused_at_once(tmp_path: Path) -> None:
    """The second thread has hashed a piece before ``write`` returns."""
    buffer = bytearray(1 << 20)
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, [("x", torch.uint8, (8 * len(buffer),))]) as writer:
        for value in range(8):
            buffer[:] = bytes([value]) * len(buffer)
            writer.write(memoryview(buffer))
        record = writer.finish()
    assert record == _record(path)
    assert_equal(load_file(path)["x"][:: len(buffer)], torch.arange(8, dtype=torch.uint8))


def test_existing_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        ShardWriter(path, [])
    assert path.read_text() == "mine"


@pytest.mark.parametrize("count", [0, 3, 5], ids=["nothing", "too-little", "too-much"])
def test_wrong_number_of_bytes_is_noticed(tmp_path: Path, count: int) -> None:
    with ShardWriter(tmp_path / "x", [("x", torch.uint8, (4,))]) as writer:
        writer.write(memoryview(bytes(count)))
        with pytest.raises(AssertionError):
            writer.finish()


def test_shard_is_flushed_before_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    record = _write(tmp_path / "x", {"x": torch.ones(100)})
    assert sizes == [record.size]


@pytest.mark.parametrize("failing", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_full_disk_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ResourceError, match=os.strerror(code)) as caught:
        _write(tmp_path / "x", {"x": torch.ones(1)})
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ResourceError, match="small"):
        write_file(tmp_path / "small", b"content")
    assert not (tmp_path / "small").exists()


def test_failure_leaks_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the very header does not fit, before there is a writer to close."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(ResourceError):
            _write(tmp_path / "x", {"x": torch.ones(1)})
        with pytest.raises(ResourceError):
            write_file(tmp_path / "y", b"content")
    assert len(list(descriptors.iterdir())) == before


def test_other_errors_stay_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write_file(tmp_path / "small", b"content")
    assert caught.value.errno == errno.EIO


def test_small_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    assert write_file(path, b"old") == _record(path)
    (tmp_path / ".tmp-config.json").write_text("left by a run that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        with pytest.raises(OSError, match="no"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert write_file(path, b"new") == _record(path)
    assert list(tmp_path.iterdir()) == [path]


def test_copies_are_equal_and_make_their_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "a" / "b" / "target"
    source.write_bytes(bytes(range(256)) * 100)
    assert copy_file(source, target) == _record(source)
    assert target.read_bytes() == source.read_bytes()

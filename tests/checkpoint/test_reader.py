"""The reader and the writer of safetensors against the library, and reading inside one folder."""

from __future__ import annotations

import contextlib
import json
import os
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.safetensors_header import (
    DTYPES,
    encode_header,
    read_header,
    tensor_bytes,
)
from convert.checkpoint.writer import ShardWriter
from kvpatch.errors import InputModelError
from tests.faults.builders import frame, llama_tensors, write_json, write_model, write_shards

unhurried = settings(deadline=None)  # a busy machine is no fault
Specs = list[tuple[str, torch.dtype, tuple[int, ...]]]

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def spec_lists(draw: st.DrawFn) -> Specs:
    """Names, dtypes and shapes of the tensors of a file."""
    chosen = draw(st.lists(names, unique=True, max_size=6))
    dtypes = st.sampled_from(sorted(DTYPES.values(), key=str))
    return [(name, draw(dtypes), draw(shapes)) for name in chosen]


def _size(specs: Specs) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in specs)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of a property share."""
    return tmp_path_factory.mktemp("reader")


@unhurried
@given(specs=spec_lists(), data=st.data())
def test_library_reads_what_we_write(folder: Path, specs: Specs, data: st.DataObject) -> None:
    path = folder / "written.safetensors"
    path.unlink(missing_ok=True)
    # bytes 0 and 1 are valid in every dtype, booleans too
    content = bytes(
        data.draw(st.lists(st.integers(0, 1), min_size=_size(specs), max_size=_size(specs)))
    )
    cut = data.draw(st.integers(0, len(content)))
    with ShardWriter(path, specs) as writer:
        writer.write(memoryview(content)[:cut])
        writer.write(memoryview(content)[cut:])
        record = writer.finish()
    assert record.size == path.stat().st_size
    start = 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _, _ in specs}
        for name, dtype, shape in specs:
            tensor = file.get_tensor(name)
            end = start + tensor.numel() * tensor.element_size()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            assert _bytes_of(tensor) == content[start:end]
            start = end


@unhurried
@given(specs=spec_lists())
def test_header_round_trip(folder: Path, specs: Specs) -> None:
    header, path = encode_header(specs), folder / "round.safetensors"
    path.write_bytes(header + bytes(_size(specs)))
    assert len(header) % 8 == 0
    infos = {info.name: info for info in read_header(path, "round")}
    start = len(header)
    assert len(infos) == len(specs)
    for name, dtype, shape in specs:
        info = infos[name]
        assert (info.dtype, info.shape, info.file, info.start) == (dtype, shape, "round", start)
        start += info.nbytes


@unhurried
@given(specs=spec_lists())
def test_we_read_what_the_library_writes(folder: Path, specs: Specs) -> None:
    path = folder / "library.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, dtype, shape in specs}
    save_file(tensors, path, metadata={"b": "é", "a": ""})
    content = path.read_bytes()
    infos = {info.name: info for info in read_header(path, "library")}
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = infos[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[info.start : info.start + info.nbytes] == _bytes_of(tensor)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
offsets = st.lists(st.integers(-1, 20), min_size=2, max_size=2)
sizes = st.integers(0, 3) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "U16", "f32", ""]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": offsets | json_values,
    }
)
headers = st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3
)


@st.composite
def sound_files(draw: st.DrawFn) -> bytes:
    specs = draw(spec_lists())
    return encode_header(specs) + bytes(_size(specs))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A sound file with a few bytes replaced, inserted or removed."""
    content = bytearray(draw(sound_files()))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 4))
        content[start : start + length] = draw(st.binary(max_size=4))
    return bytes(content)


any_files = (
    st.binary(max_size=64)
    | st.builds(frame, st.binary(max_size=40) | headers, st.binary(max_size=24))
    | st.builds(
        lambda header, code: frame(json.dumps(header).encode(code)),
        headers,
        st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]),
    )
    | damaged_files()
)


@unhurried
@given(content=any_files)
def test_any_bytes_are_refused_or_read_as_the_library_reads_them(
    folder: Path, content: bytes
) -> None:
    assume(b"-0" not in content)  # minus zero is a size for Python and none for the library
    path = folder / "any.safetensors"
    path.write_bytes(content)
    try:
        infos = read_header(path, "any.safetensors")
    except InputModelError:
        return
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        pytest.fail(f"we accept what the library refuses ({error}): {content!r}")
    assert {info.name for info in infos} == tensors.keys()
    for info in infos:
        tensor = tensors[info.name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[info.start : info.start + info.nbytes] == _bytes_of(tensor)


@pytest.mark.parametrize(
    "text",
    [
        b'\xef\xbb\xbf{"__metadata__": {}}',
        '{"__metadata__": {}}'.encode("utf-16"),
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": "a"}',
        b'{"__metadata__": NaN}',
        b'{"__metadata__": {"\\ud800": ""}}',
    ],
    ids=["bom", "utf16", "number", "text", "nan", "surrogate"],
)
def test_header_that_the_library_refuses(folder: Path, text: bytes) -> None:
    path = folder / "refused.safetensors"
    path.write_bytes(frame(text))
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(InputModelError):
        read_header(path, path.name)


@pytest.mark.parametrize("size", [8, 24, 1 << 20])
def test_chunks_and_whole_tensors_are_those_of_the_library(tmp_path: Path, size: int) -> None:
    model = write_shards(tmp_path / "model")
    expected = load_file(model / "a.safetensors") | load_file(model / "b.safetensors")
    with Checkpoint(model) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert checkpoint.read(name).equal(tensor)
            # a chunk is valid until the next is asked for, so each is copied
            pieces = [bytes(chunk) for chunk in checkpoint.chunks(name, size)]
            assert all(len(piece) == size for piece in pieces[:-1])
            assert b"".join(pieces) == bytes(tensor_bytes(tensor)) == _bytes_of(tensor)


def test_only_headers_are_read_on_opening(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"large": torch.zeros(4 << 20)})
    before = _bytes_read()
    with Checkpoint(model) as checkpoint:
        assert checkpoint.tensors["large"].nbytes == 16 << 20
    assert 0 < _bytes_read() - before < 1 << 20


def _bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


class Opened:
    """All files that Python code opens in a ``with`` block, by whatever call it does so."""

    def __init__(self) -> None:
        self._paths: list[Path] | None = None
        sys.addaudithook(self._record)  # for good: an audit hook cannot be removed

    def __enter__(self) -> list[Path]:
        self._paths = []
        return self._paths

    def __exit__(self, *error: object) -> None:
        self._paths = None

    def _record(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._paths is not None and isinstance(arguments[0], str | bytes):
            self._paths.append(Path(os.fsdecode(arguments[0])))


@pytest.fixture(scope="module")
def opened_files() -> Opened:
    return Opened()


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sound weight files around it, and links that lead to them."""
    outside = tmp_path_factory.mktemp("outside")
    model = write_shards(outside / "model")
    weights = (model / "a.safetensors").read_bytes()
    (outside / "deep").mkdir()
    for path in (outside / "a.safetensors", outside / "deep" / "a.safetensors"):
        path.write_bytes(weights)
    (model / "link.safetensors").symlink_to("../a.safetensors")
    (model / "folder").symlink_to("../deep")
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    return model


parts = st.text(string.printable, max_size=4) | st.sampled_from(
    (
        *("..", ".", "/", "//", "\\", "C:", "~", "\0", "%2e%2e", "\ud800", "é", "x" * 300),
        *("a.safetensors", "link.safetensors", "loop.safetensors", "folder", "deep", "model"),
    )
)
hostile_names = st.lists(parts, min_size=1, max_size=6).flatmap(
    lambda chosen: st.sampled_from(["".join(chosen), "/".join(chosen)])
)


@unhurried
@given(name=hostile_names, absolute=st.booleans())
def test_no_weight_map_opens_a_file_outside(
    besieged: Path, opened_files: Opened, name: str, absolute: bool
) -> None:
    index = besieged / "model.safetensors.index.json"
    file = f"{besieged.parent if absolute else ''}{name}"
    file += "" if file.endswith(".safetensors") else ".safetensors"
    write_json(index, {"weight_map": dict.fromkeys(llama_tensors(), file)})
    with (
        opened_files as opened,
        contextlib.suppress(InputModelError),
        Checkpoint(besieged) as checkpoint,
    ):
        checkpoint.read("lm_head.weight")
    assert index in opened, "the spy is blind"
    root = besieged.resolve()
    assert [path for path in opened if not path.resolve().is_relative_to(root)] == []


@unhurried
@given(name=hostile_names)
def test_guarded_path_is_inside_or_an_error(besieged: Path, name: str) -> None:
    try:
        path = guarded_path(besieged, name)
    except InputModelError:
        return
    assert path.resolve().is_relative_to(besieged.resolve())

"""The header of a safetensors file, parsed strictly from the first bytes alone.

Format: eight bytes little-endian header length, that many bytes of JSON, then the tensor data
(https://github.com/huggingface/safetensors#format). The checks are those of the reference reader,
and two of ours: no duplicate names, and damage is named by its likely cause.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvpatch.errors import InputModelError

__all__ = [
    "DTYPES",
    "TensorInfo",
    "check_magic",
    "dtype_name",
    "encode_header",
    "header_bytes",
    "read_header",
    "tensor_bytes",
    "unique_json",
]

MAX_HEADER_BYTES = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` in the checkpoint."),
    (b"<!doctype html", "an HTML page", "A download was answered by a web page; download again."),
    (b"<html", "an HTML page", "A download was answered by a web page; download again."),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Args:
        name: Name in the checkpoint.
        dtype: Its dtype.
        shape: Its shape.
        file: File name inside the checkpoint.
        start: Offset of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in the safetensors format.

    Raises:
        InputModelError: If the format has none.
    """
    if dtype not in _NAMES:
        raise InputModelError(f"safetensors has no dtype for {dtype}")
    return _NAMES[dtype]


def unique_json(text: str | bytes, where: str) -> Any:
    """Parse JSON that must not name a key twice.

    Raises:
        InputModelError: With ``where`` it lies and what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputModelError(f"{where}: key {key!r} stands there twice")
            result[key] = value
        return result

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
        return value
    except (ValueError, RecursionError) as error:
        raise InputModelError(f"{where} is not valid JSON: {error}") from error


def header_bytes(stream: BinaryIO, size: int, file: str) -> bytes:
    """The beginning of a safetensors file up to its data.

    Args:
        stream: The file, at its first byte.
        size: Bytes of the whole file.
        file: Its name inside the checkpoint, for messages.

    Raises:
        InputModelError: If the file is truncated or not safetensors.
    """
    start = _check_prefix(stream, size, file)
    stream.seek(0)
    return stream.read(start)


def read_header(path: Path, file: str, size: int | None = None) -> list[TensorInfo]:
    """Tensors of one safetensors file, in the order of their data.

    Args:
        path: The file.
        file: Its name inside the checkpoint, for messages and for the result.
        size: Bytes of the whole file, where only its header is at ``path``.

    Raises:
        InputModelError: If the file is truncated, not safetensors, or inconsistent.
    """
    size = path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        start = _check_prefix(stream, size, file)
        header = unique_json(stream.read(start - 8), f"{file}: header")
    if not isinstance(header, dict):
        raise InputModelError(f"{file}: the header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputModelError(f"{file}: __metadata__ is not a mapping of text to text")
    infos = sorted(
        (_entry(name, value, file, start) for name, value in header.items()),
        key=lambda info: (info.start, info.nbytes),
    )
    end = start
    for info in infos:
        if info.start != end:
            raise InputModelError(
                f"{file}: tensor {info.name!r} starts at byte {info.start}, expected {end}",
                hint="The header is damaged; download the file again.",
            )
        end += info.nbytes
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise InputModelError(
            f"{file} is {what}: {size:,} bytes, expected {end:,}",
            hint=f"Download {file} again.",
        )
    return infos


def encode_header(infos: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Header of a file that holds these tensors back to back, padded to eight bytes.

    The only metadata is ``{"format": "pt"}``: the order of several keys would not be stable
    between runs of other writers, and provenance has its own file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in infos:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Memory of a tensor as bytes; a view where the tensor is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_magic(head: bytes, size: int, file: str, *, wanted: str = "weights") -> None:
    """Name what often stands where a file of weights, or another, should.

    Raises:
        InputModelError: If the first bytes of the file are those of something else.
    """
    for magic, what, hint in _NOT_WEIGHTS:
        if head.lower().startswith(magic):
            raise InputModelError(f"{file} is {what}, not {wanted} ({size:,} bytes)", hint=hint)


def _check_prefix(stream: BinaryIO, size: int, file: str) -> int:
    head = stream.read(64)
    check_magic(head, size, file)
    if size < 8:
        raise InputModelError(
            f"{file} is empty or truncated: {size} bytes", hint=f"Download {file} again."
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise InputModelError(
            f"{file} is not safetensors, or truncated: "
            f"header of {length:,} bytes in a file of {size:,}",
            hint=f"Download {file} again.",
        )
    stream.seek(8)
    return 8 + length


def _entry(name: str, value: Any, file: str, start: int) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputModelError(f"{where}: header entry is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputModelError(f"{where}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise InputModelError(f"{where}: shape or data_offsets are not lists of integers >= 0")
    if prod(max(1, size) for size in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise InputModelError(f"{where}: shape {shape} is larger than any tensor can be")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape), file, start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise InputModelError(
            f"{where}: {offsets[1] - offsets[0]} bytes of data for {dtype} {shape}"
        )
    return info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

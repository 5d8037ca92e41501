"""Pickled weight files: located without running their code, and without trusting their sizes.

Only the pickle is interpreted, on tensors without data; torch then states where in the file the
data of each lies (https://docs.pytorch.org/docs/stable/notes/serialization.html), and the reader
fetches it by pread as from a safetensors file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.safetensors_header import DTYPES, TensorInfo, check_magic
from kvpatch.errors import InputModelError

__all__ = ["read_pickle"]


def read_pickle(path: Path, file: str) -> list[TensorInfo]:
    """Tensors of a ``.bin`` file.

    Raises:
        InputModelError: If the file needs code to load, is compressed (and so may be far larger
            in memory than on disk), is no mapping of names to dense contiguous tensors, or a
            tensor reaches beyond the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        check_magic(stream.read(64), size, file)
    _check_archive(path, file)
    state = _load_without_data(path, file)
    if not isinstance(state, dict):
        kind = "Tensor" if isinstance(state, Tensor) else type(state).__name__
        raise InputModelError(f"{file} holds a {kind}, not a state dict")
    return [_locate(name, tensor, file, size) for name, tensor in state.items()]


def _check_archive(path: Path, file: str) -> None:
    try:
        if not zipfile.is_zipfile(path):
            raise InputModelError(
                f"{file} is damaged, or was saved by torch before 1.6",
                hint="Download it again, or load and save it once with a newer torch.",
            )
        with zipfile.ZipFile(path) as archive:
            methods = {entry.compress_type for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputModelError(f"{file} cannot be read: {error}") from error
    if methods - {zipfile.ZIP_STORED}:
        raise InputModelError(f"{file} is compressed, which torch.save never does")


def _load_without_data(path: Path, file: str) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - slow to import

    try:
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputModelError(
            f"{file} asks to run code when loaded and is refused",
            hint="Use a safetensors revision of the checkpoint.",
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise InputModelError(f"{file} cannot be read: {error}") from error


def _locate(name: object, tensor: object, file: str, size: int) -> TensorInfo:
    dense = (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and tensor.is_contiguous()
    )
    if not dense:
        raise InputModelError(f"{file}: entry {name!r} is not a dense contiguous tensor")
    assert isinstance(name, str)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in DTYPES.values():
        raise InputModelError(
            f"{file}: tensor {name!r} has dtype {tensor.dtype}, for which a result has no place"
        )
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise InputModelError(f"{file}: torch does not say where {name!r} lies in the file")
    start = offset + tensor.storage_offset() * tensor.element_size()
    info = TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, start)
    if start < 0 or start + info.nbytes > size:
        raise InputModelError(
            f"{file}: tensor {name!r} claims {info.nbytes:,} bytes from byte {start:,}, "
            f"the file has {size:,}"
        )
    return info

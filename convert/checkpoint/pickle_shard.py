"""Pickled weight files: read without running their code, and without trusting their sizes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvpatch.errors import InputModelError

__all__ = ["read_pickle"]


def read_pickle(path: Path, file: str) -> Mapping[str, Tensor]:
    """Tensors of a ``.bin`` file, memory-mapped where its format allows.

    Raises:
        InputModelError: If the file needs code to load, is no mapping of names to dense tensors,
            or a tensor claims more bytes than the file has (a tensor of stride 0 would allocate
            them on use).
    """
    size = path.stat().st_size
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputModelError(
            f"{file} asks to run code when loaded and is refused",
            hint="Use a safetensors revision of the checkpoint.",
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise InputModelError(f"{file} holds a {type(state).__name__}, not a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            raise InputModelError(f"{file}: entry {name!r} is not a dense tensor")
        claimed = tensor.numel() * tensor.element_size()
        if claimed > size:
            raise InputModelError(
                f"{file}: tensor {name!r} claims {claimed:,} bytes, the file has {size:,}"
            )
    return state

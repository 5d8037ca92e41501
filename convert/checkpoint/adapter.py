"""LoRA adapters as peft writes them: ``adapter_config.json`` and one file of tensors.

An adapter adds ``scaling * B A`` to the weight of a module (Hu et al., arXiv:2106.09685), and may
hold tensors that take the place of the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    TENSOR_FILES,
    UNMERGED,
    is_target,
    read_adapter_config,
    scaling_of,
)
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.pickle_shard import read_pickle
from convert.checkpoint.reader import FileState
from convert.checkpoint.safetensors_header import TensorInfo, read_header, tensor_bytes
from kvpatch.errors import InputModelError, UntrustedSourceError

__all__ = ["Adapter", "Factors", "find_adapter"]

_PREFIX = "base_model.model."
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FACTOR = re.compile(r"(.+)\.(lora_[AB]|lora_embedding_[AB])(\.weight|\.bias)?")


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to one module.

    Args:
        a: Name of the factor [r, in] in the adapter's file.
        b: Name of the factor [out, r].
        scaling: Factor on their product ``B A``, [out, in].
        bias: Name of what is added to the bias, scaled likewise, [out]; None if nothing is.
        embedding: The module is an embedding, whose weight is [in, out].
    """

    a: str
    b: str
    scaling: float
    bias: str | None
    embedding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter whose config and headers were checked, apart from any base.

    Args:
        root: Its folder.
        config: Its adapter_config.json.
        tensors: Its tensors, by their names in the file.
        modules: What it adds, by the name of the module in the base.
        replaced: Tensors that take the place of the base's, by the names of these.
        files: State of its files when they were read.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, Factors]
    replaced: Mapping[str, str]
    files: Mapping[str, FileState]

    @property
    def file(self) -> str:
        """Name of the file of its tensors."""
        return next(name for name in self.files if name != ADAPTER_CONFIG)

    def is_copy(self, name: str) -> bool:
        """Whether a tensor of ``replaced`` is of a module that was copied and trained whole.

        Others take the place of the base's own parameters, of tied ones too.
        """
        parts = name.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts))]
        return any(
            module.endswith(copied)
            for copied in self.config.get("modules_to_save") or ()
            for module in around
        )

    def values(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Numbers of a tensor in row-major order, [count], in float32 or wider.

        Raises:
            InputModelError: If they hold NaN or infinity, or the file was changed meanwhile.
        """
        info = self.tensors[name]
        count = prod(info.shape) - first if count is None else count
        stored = torch.empty(count, dtype=info.dtype)
        view = tensor_bytes(stored)
        try:
            with (self.root / info.file).open("rb") as stream:
                stream.seek(info.start + first * info.dtype.itemsize)
                read = stream.readinto(view)
        except OSError as error:
            raise UntrustedSourceError(f"{info.file} cannot be read: {error.strerror}") from error
        if read < len(view):
            raise UntrustedSourceError(f"{info.file} ended while it was read")
        if not bool(torch.isfinite(stored).all()):
            raise InputModelError(f"{info.file}: {name!r} holds NaN or infinity")
        return stored.to(torch.promote_types(info.dtype, torch.float32))

    def matrix(self, name: str) -> Tensor:
        """A tensor as a whole, in float32 or wider."""
        return self.values(name).view(self.tensors[name].shape)


def find_adapter(
    folder: Path, *, allow_pickle: bool = False, sizes: Mapping[str, int] | None = None
) -> Adapter | None:
    """The adapter of a folder, read from its config and headers alone; None if there is none.

    Args:
        folder: Where ``adapter_config.json`` may lie.
        allow_pickle: Read ``adapter_model.bin`` too, with ``weights_only``.
        sizes: Bytes of each file of which only the header is there.

    Raises:
        InputModelError: If it is damaged, contradicts itself, or is none that can be merged.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return None
    config = read_adapter_config(folder)
    file = _tensor_file(folder, allow_pickle)
    path = guarded_path(folder, file)
    if file.endswith(".bin"):
        infos = read_pickle(path, file)
    else:
        infos = read_header(path, file, (sizes or {}).get(file))
    tensors = {info.name: info for info in infos}
    modules, replaced = _sorted(tensors, config, file)
    return Adapter(
        root=folder,
        config=config,
        tensors=tensors,
        modules=modules,
        replaced=replaced,
        files={name: FileState.of(folder / name) for name in (file, ADAPTER_CONFIG)},
    )


def _tensor_file(folder: Path, allow_pickle: bool) -> str:
    safe, pickled = TENSOR_FILES
    if (folder / safe).exists():
        return safe
    if not (folder / pickled).exists():
        raise InputModelError(
            f"{folder} has {ADAPTER_CONFIG}, but no {safe}",
            hint=f"Download the adapter again, or remove {ADAPTER_CONFIG}.",
        )
    if not allow_pickle:
        raise InputModelError(
            f"the adapter in {folder} is pickled ({pickled}), which can run code when loaded",
            hint="Save it as safetensors, or give --allow-pickle to read it with weights_only.",
        )
    return pickled


def _sorted(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], file: str
) -> tuple[dict[str, Factors], dict[str, str]]:
    """What the tensors add and what they replace, by names in the base."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name, info in tensors.items():
        if info.dtype not in _FLOATING:
            raise InputModelError(f"{file}: {name!r} has dtype {info.dtype}, which is no LoRA's")
        own = name.removeprefix(_PREFIX)
        if found := _FACTOR.fullmatch(own):
            module, part, leaf = found.groups(default="")
            parts.setdefault(module, {})[part + leaf] = name
        elif ".lora_" in own or ".base_layer." in own.removesuffix(".weight").removesuffix(".bias"):
            raise InputModelError(f"{file}: {name!r} is no tensor of a plain LoRA", hint=UNMERGED)
        else:
            replaced[own.replace(".base_layer.", ".")] = name
    modules = {
        module: _factors(module, names, tensors, config, file) for module, names in parts.items()
    }
    return modules, replaced


def _factors(
    module: str,
    names: dict[str, str],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    file: str,
) -> Factors:
    embedding = any(part.startswith("lora_embedding") for part in names)
    a, b = (
        names.pop(f"lora_embedding_{side}" if embedding else f"lora_{side}.weight", None)
        for side in "AB"
    )
    bias = names.pop("lora_B.bias", None)
    if a is None or b is None or names:
        raise InputModelError(
            f"{file}: {module} has {sorted(names.values()) or 'one factor'}, expected a pair of "
            "lora_A and lora_B"
        )
    rank, scaling = scaling_of(module, config)
    inner, outer = tensors[a].shape, tensors[b].shape
    if len(inner) != 2 or len(outer) != 2 or {inner[0], outer[1]} != {rank}:
        raise InputModelError(
            f"{file}: the factors of {module} have shapes {inner} and {outer}, expected "
            f"({rank}, in) and (out, {rank}): {ADAPTER_CONFIG} gives it rank {rank}"
        )
    if not is_target(module, config):
        raise InputModelError(
            f"{file} holds factors of {module}, which the target_modules of {ADAPTER_CONFIG} do "
            "not name; peft would leave them out",
            hint="Restore the adapter_config.json that was saved with it.",
        )
    return Factors(a, b, scaling, bias, embedding)

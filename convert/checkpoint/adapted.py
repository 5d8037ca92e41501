"""A checkpoint whose tensors are read with an adapter merged into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from convert.checkpoint.adapter import Adapter, Factors
from convert.checkpoint.reader import CHUNK_BYTES, Checkpoint
from convert.checkpoint.safetensors_header import TensorInfo, tensor_bytes
from kvpatch.errors import InputModelError

__all__ = ["AdaptedCheckpoint", "Change"]


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter makes of one tensor of its base.

    Args:
        instead: Tensor of the adapter that takes its place; None if it stays.
        factors: Whose product is added to it, or whose bias is; None if nothing is.
        flipped: The weight is [in, out], as of embeddings and Conv1D.
        bias: The tensor is the bias of the module that the factors are of.
    """

    instead: str | None = None
    factors: Factors | None = None
    flipped: bool = False
    bias: bool = False


class AdaptedCheckpoint(Checkpoint):
    """An open checkpoint with an adapter merged into what is read of it.

    Sums are computed in float32, or in float64 if the base has it, and rounded once to the dtype of
    the base; a piece of one tensor is in memory at a time. Names, shapes and dtypes are those of
    the base, and its files and those of the adapter are the files of this checkpoint.

    Args:
        base: The open base; it is closed with this one.
        adapter: The adapter.
        changes: What it makes of tensors, by name.
        untied: Name that the output embedding gets, and that of the input embedding, if the base
            has one tensor for both and the adapter makes two of it.

    Raises:
        InputModelError: On reading, if adapter or sum are not finite.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        changes: Mapping[str, Change],
        *,
        untied: tuple[str, str] | None = None,
    ) -> None:
        self.adapter, self.changes = adapter, changes
        self.root, self.warnings = base.root, base.warnings
        self.config, self.tensors = dict(base.config), dict(base.tensors)
        self.paths: dict[str, Path] = dict(base.paths)
        self.paths |= {name: adapter.root / name for name in adapter.files}
        self.files = {**base.files, **adapter.files}
        self._base = base
        self._stored = {}
        if untied is not None:
            head, embedding = untied
            self.config["tie_word_embeddings"] = False
            self.tensors[head] = dataclasses.replace(base.tensors[embedding], name=head)
            self._stored[head] = embedding

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._base.__exit__(kind, error, trace)

    @property
    def merging_bytes(self) -> int:
        """Most memory that merging a piece of a tensor takes beside the piece, in bytes."""
        factors = [
            4 * sum(prod(self.adapter.tensors[name].shape) for name in (found.a, found.b))
            for found in self.adapter.modules.values()
        ]
        # a piece of 2 byte numbers in float32, its sum's other part, and the rounded sum
        return 2 * max(factors, default=0) + 6 * CHUNK_BYTES

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        if name not in self.changes:
            return self._base.read(self._stored.get(name, name))
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        view, done = tensor_bytes(tensor), 0
        for chunk in self.chunks(name):  # the same pieces, so that sums have the same bits
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return tensor

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Bytes of a tensor in order; see ``Checkpoint.chunks``."""
        stored = self._base.chunks(self._stored.get(name, name), size)
        change = self.changes.get(name)
        return stored if change is None else self._merged(self.tensors[name], change, stored)

    def _merged(
        self, info: TensorInfo, change: Change, stored: Iterator[memoryview]
    ) -> Iterator[memoryview]:
        added, first = _Added(self.adapter, change, info), 0
        for chunk in stored:
            own = torch.frombuffer(chunk, dtype=info.dtype)
            if change.instead is not None:
                own = self.adapter.values(change.instead, first, len(own))
            total = added.to(own, first)
            merged = total.to(info.dtype)
            if bool(torch.isfinite(total).all()) and not bool(torch.isfinite(merged).all()):
                raise InputModelError(
                    f"{info.name!r} overflows in {str(info.dtype).removeprefix('torch.')} once "
                    f"{self.adapter.file} is merged into it",
                    hint="Cast the base to bfloat16 or float32 first.",
                )
            yield tensor_bytes(merged)
            first += len(own)


class _Added:
    """What factors add to a tensor, piece by piece."""

    def __init__(self, adapter: Adapter, change: Change, info: TensorInfo) -> None:
        factors = change.factors
        self._wide = torch.promote_types(info.dtype, torch.float32)
        self._bias: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        if factors is None:
            return
        self._scaling = factors.scaling
        if change.bias:
            assert factors.bias is not None
            self._bias = adapter.matrix(factors.bias).to(self._wide)
            return
        a, b = (adapter.matrix(name).to(self._wide) for name in (factors.a, factors.b))
        self._rows = (a.t(), b.t()) if change.flipped else (b, a)
        self._width = info.shape[1]

    def to(self, values: Tensor, first: int) -> Tensor:
        """A piece [N] of the tensor, from its number ``first`` on, with what is added to it."""
        values, last = values.to(self._wide), first + len(values)
        if self._bias is not None:
            return values + self._bias[first:last] * self._scaling
        if self._rows is None:
            return values
        left, right = self._rows
        row = first // self._width
        product = (left[row : -(-last // self._width)] @ right).mul_(self._scaling)
        start = first - row * self._width
        return product.flatten()[start : start + len(values)].add_(values)

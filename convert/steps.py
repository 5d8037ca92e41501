"""The steps of a conversion: which source tensors become which tensors of the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.safetensors_header import TensorInfo
from convert.facts import ModelFacts
from convert.families import pack, tensor_names, unpack
from convert.layer import AttentionLayer, LatentLayer
from convert.methods import Method, Outline
from convert.targets import Rewrite, Target

__all__ = ["Step", "Steps", "TensorSpec", "emit", "units_of"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Step:
    """Source tensors that become output tensors together.

    Args:
        inputs: Names in the source.
        outputs: Tensors written, in this order.
        layers: Decoder layers that the method converts together; none where one tensor is copied,
            cast, rewritten or dropped, or where a constant is added.
        rewrites: Where one tensor is copied, cast or rewritten, how each output comes of it.
        constant: Value of all entries of an output that has no input.
    """

    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[int, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    constant: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(spec.nbytes for spec in self.outputs)


def units_of(sources: Sequence[int]) -> list[tuple[int, ...]]:
    """Layers that share the keys and values of one of them, which comes first; in layer order."""
    members: dict[int, list[int]] = {}
    for layer, source in enumerate(sources):
        members.setdefault(source, []).append(layer)
    return [tuple(unit) for unit in members.values()]


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps in the order of the source files, each at the place of its first input."""

    tensors: Mapping[str, TensorInfo]
    facts: ModelFacts
    method: Method
    target: Target
    sources: tuple[int, ...]
    dtype: torch.dtype | None

    def __iter__(self) -> Iterator[Step]:
        unit_of = {name: unit for unit in units_of(self.sources) for name in self._names(unit)}
        inputs: dict[tuple[int, ...], list[str]] = {}
        for name in self.tensors:
            if name in unit_of:
                inputs.setdefault(unit_of[name], []).append(name)
        done: set[tuple[int, ...]] = set()
        outlines: dict[Any, list[list[TensorSpec]]] = {}  # units mostly agree
        for name, info in self.tensors.items():
            unit = unit_of.get(name)
            if unit is None:
                yield self._whole(name, info)
            elif unit not in done:
                done.add(unit)
                yield self._unit(unit, inputs[unit], outlines)
        own = next((i.dtype for i in self.tensors.values() if i.dtype.is_floating_point), None)
        for constant in self.target.constants:
            spec = TensorSpec(
                constant.name, _cast(own or torch.float32, self.dtype), constant.shape
            )
            yield Step((), (spec,), constant=constant.value)

    def _names(self, unit: tuple[int, ...]) -> Iterator[str]:
        """Tensors that a unit may read, whether the checkpoint has them or not."""
        reads = self.method.reads | self.target.reads
        for layer in unit:
            yield from tensor_names(self.facts.family, self.facts.geometry, layer, reads)
            prefix = self.facts.family.layer_prefix.format(layer=layer)
            yield from (prefix + name for name in (*self.method.tensors, *self.target.folds))

    def _whole(self, name: str, info: TensorInfo) -> Step:
        """The step of a tensor that no layer takes."""
        rewrites = self.target.rewrites(name)
        specs = []
        for rewrite in rewrites:
            shape = info.shape
            if rewrite.transform is not None and not rewrite.elementwise:
                shape = tuple(rewrite.transform(_zeros(info.dtype, shape)).shape)
            specs.append(TensorSpec(rewrite.name, _cast(info.dtype, self.dtype), shape))
        return Step((name,), tuple(specs), rewrites=rewrites)

    def _unit(
        self, unit: tuple[int, ...], names: list[str], outlines: dict[Any, list[list[TensorSpec]]]
    ) -> Step:
        family, result = self.facts.family, self.target.family
        bare: list[tuple[TensorSpec, ...]] = []
        for layer in unit:
            prefix = family.layer_prefix.format(layer=layer)
            bare.append(
                tuple(
                    TensorSpec(
                        name.removeprefix(prefix),
                        self.tensors[name].dtype,
                        self.tensors[name].shape,
                    )
                    for name in names
                    if name.startswith(prefix)
                )
            )
        outline = self.method.outlines.get(unit[0], self.method.outline)
        key = (tuple(bare), outline)
        if key not in outlines:
            outlines[key] = _outline(key[0], self.facts, outline, self.target)
        return Step(
            tuple(names),
            tuple(
                TensorSpec(
                    result.layer_prefix.format(layer=layer) + spec.name,
                    _cast(spec.dtype, self.dtype),
                    spec.shape,
                )
                for layer, specs in zip(unit, outlines[key], strict=True)
                for spec in specs
            ),
            unit,
        )


def _outline(
    unit: tuple[tuple[TensorSpec, ...], ...], facts: ModelFacts, outline: Outline, target: Target
) -> list[list[TensorSpec]]:
    """Names, shapes and dtypes that method and target make of the layers of a unit.

    Args:
        unit: Tensors of each layer, named without its prefix.
        facts: The source.
        outline: Of the conversion.
        target: What the result is written as.
    """
    source = facts.family.layer_prefix.format(layer=0)
    result = target.family.layer_prefix.format(layer=0)
    zeros = [
        {source + spec.name: _zeros(spec.dtype, spec.shape) for spec in specs} for specs in unit
    ]
    before = [unpack(layer, facts.family, facts.geometry, 0) for layer in zeros]
    outlined = []
    for tensors, after in zip(zeros, outline(before), strict=True):
        specs = [
            TensorSpec(name.removeprefix(result), tensor.dtype, tuple(tensor.shape))
            for name, tensor in emit(after, tensors, facts, target, 0).items()
        ]
        outlined.append(specs)
    return outlined


def emit(
    after: AttentionLayer | LatentLayer,
    tensors: Mapping[str, Tensor],
    facts: ModelFacts,
    target: Target,
    layer: int,
) -> dict[str, Tensor]:
    """Tensors of the result that a converted layer becomes.

    Args:
        after: The layer as the method left it.
        tensors: What was read of the layer, by name; its ``folds`` are used.
        facts: The source.
        target: What the result is written as.
        layer: Decoder layer.
    """
    source = facts.family.layer_prefix.format(layer=layer)
    result = target.family.layer_prefix.format(layer=layer)
    folds = {name: tensors[source + name] for name in target.folds if source + name in tensors}
    folded, others = target.fold(after, folds)
    written = {} if folded is None else pack(folded, target.family, layer)
    return written | {result + name: tensor for name, tensor in others.items()}


def _zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One zero, repeated. A meta tensor would do too, but its first use imports 75 MB of torch."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own

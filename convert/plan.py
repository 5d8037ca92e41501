"""The plan of a conversion, from config.json and tensor headers alone.

What the plan says is what happens: the engine walks its steps and writes its shards, and the
shapes come from running the method itself on tensors without data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from convert.checkpoint.reader import CHUNK_BYTES, Checkpoint
from convert.checkpoint.safetensors_header import TensorInfo
from convert.facts import ModelFacts, check_shapes
from convert.families import pack, tensor_names, unpack
from convert.methods import Method
from kvpatch.errors import InputModelError
from kvpatch.memory import KVCache

__all__ = ["Fate", "Plan", "Shard", "Step", "TensorSpec", "make_plan"]

# interpreter, torch and this package, resident: measured by benchmarks/convert.py
RUNTIME_RAM = 270_000_000
_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


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
        layer: Decoder layer that the method converts; None where one tensor is copied or cast.
    """

    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    layer: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result and the steps that fill it, front to back."""

    file: str
    steps: tuple[Step, ...]

    @property
    def tensors(self) -> list[TensorSpec]:
        """Its tensors in file order."""
        return [spec for step in self.steps for spec in step.outputs]


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one source tensor; ``after`` is None if it has no counterpart."""

    name: str
    action: str
    before: tuple[int, ...]
    after: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that will be written and what it takes.

    Args:
        facts: The source.
        shards: The files of the result.
        method: What converts a layer.
        before: KV cache of the source.
        after: KV cache of the result.
        source_bytes: Bytes of all source tensors.
        peak_ram: Most resident memory the run takes, in bytes.
        plan_id: Hash of all that determines the result.
    """

    facts: ModelFacts
    shards: tuple[Shard, ...]
    method: Method
    before: KVCache
    after: KVCache
    source_bytes: int
    peak_ram: int
    plan_id: str

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(step.nbytes for shard in self.shards for step in shard.steps)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors of the result."""
        return sum(prod(spec.shape) for shard in self.shards for spec in shard.tensors)

    def fates(self, tensors: Mapping[str, TensorInfo]) -> list[Fate]:
        """Fate of every source tensor, in file order."""
        fates = []
        for shard in self.shards:
            for step in shard.steps:
                written = {spec.name: spec for spec in step.outputs}
                for name in step.inputs:
                    fates.append(_fate(tensors[name], written.get(name), step))
        return fates


def make_plan(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    method: Method,
    *,
    kv_heads: int,
    dtype: str | None,
    max_shard_bytes: int,
    recipe: Mapping[str, Any],
) -> Plan:
    """Plan a conversion that keeps the model in its own stock class.

    Args:
        checkpoint: The open source; only its headers are used.
        facts: Its attention.
        method: The conversion of a layer.
        kv_heads: KV heads of each layer afterwards.
        dtype: Name of the dtype of all floating tensors of the result; None keeps each as it is.
        max_shard_bytes: Largest weight file, unless a single step needs more.
        recipe: What determines the result, for the plan's identity.

    Raises:
        InputModelError: If headers contradict config.json, or hold quantised weights.
    """
    check_shapes(facts, {name: info.shape for name, info in checkpoint.tensors.items()})
    cast = getattr(torch, dtype) if dtype is not None else None
    steps = list(_steps(checkpoint.tensors, facts, method, cast))
    return Plan(
        facts=facts,
        shards=_shards(steps, max_shard_bytes),
        method=method,
        before=facts.cache(),
        after=facts.cache(kv_heads=kv_heads, dtype=dtype),
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        peak_ram=RUNTIME_RAM + max(_working_bytes(s, checkpoint.tensors, method) for s in steps),
        plan_id=_identity(checkpoint, recipe),
    )


def _steps(
    tensors: Mapping[str, TensorInfo],
    facts: ModelFacts,
    method: Method,
    dtype: torch.dtype | None,
) -> Iterator[Step]:
    """Steps in the order of the source files, each at the place of its first input."""
    layer_of = {
        name: layer
        for layer in range(facts.layers)
        for name in tensor_names(facts.family, facts.geometry, layer, method.reads)
    }
    inputs: dict[int, list[str]] = {}
    for name in tensors:
        if name in layer_of:
            inputs.setdefault(layer_of[name], []).append(name)
    done: set[int] = set()
    outputs: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}  # layers mostly agree
    for name, info in tensors.items():
        if info.dtype in _QUANTISED:
            raise InputModelError(
                f"{info.file}: {name!r} has dtype {info.dtype}: the weights are quantised",
                hint="Convert the unquantised checkpoint and quantise the result.",
            )
        layer = layer_of.get(name)
        if layer is None:
            yield Step((name,), (TensorSpec(name, _cast(info.dtype, dtype), info.shape),))
        elif layer not in done:
            done.add(layer)
            names = tuple(inputs[layer])
            prefix = facts.family.layer_prefix.format(layer=layer)
            bare = tuple(
                TensorSpec(n.removeprefix(prefix), tensors[n].dtype, tensors[n].shape)
                for n in names
            )
            if bare not in outputs:
                outputs[bare] = _outline(bare, facts, method)
            yield Step(
                names,
                tuple(
                    TensorSpec(prefix + spec.name, _cast(spec.dtype, dtype), spec.shape)
                    for spec in outputs[bare]
                ),
                layer,
            )


def _outline(
    inputs: tuple[TensorSpec, ...], facts: ModelFacts, method: Method
) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtypes that the method makes of a layer.

    Each tensor is one zero, repeated. Meta tensors would do too, but their first use imports a
    second and 75 MB of torch.

    Args:
        inputs: Tensors of a layer, named without its prefix.
        facts: The source.
        method: The conversion.
    """
    prefix = facts.family.layer_prefix.format(layer=0)
    zeros = {
        prefix + spec.name: torch.zeros((), dtype=spec.dtype).expand(spec.shape) for spec in inputs
    }
    after = method.outline(unpack(zeros, facts.family, facts.geometry, 0))
    return tuple(
        TensorSpec(name.removeprefix(prefix), tensor.dtype, tuple(tensor.shape))
        for name, tensor in pack(after, facts.family, 0).items()
    )


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _shards(steps: list[Step], limit: int) -> tuple[Shard, ...]:
    """Cut the steps into files, in order; a step is never cut."""
    files: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if files[-1] and size + step.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(step)
        size += step.nbytes
    count = len(files)
    return tuple(
        Shard(
            f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors",
            # wide dtypes first keeps every tensor aligned in the file
            tuple(sorted(file, key=lambda step: -step.outputs[0].dtype.itemsize)),
        )
        for i, file in enumerate(files, 1)
    )


def _working_bytes(step: Step, tensors: Mapping[str, TensorInfo], method: Method) -> int:
    """Memory of a step: chunk buffers, and for a layer its tensors before and after."""
    buffers = 6 * CHUNK_BYTES
    if step.layer is None:
        return buffers
    target = step.outputs[0].dtype  # a cast widens what is read before it is converted
    held, results, raw = [], 0, 0
    for info in (tensors[name] for name in step.inputs):
        wide = torch.promote_types(info.dtype, target)
        held.append(prod(info.shape) * wide.itemsize)
        if wide != info.dtype:
            raw = max(raw, info.nbytes)
        results = max(results, wide.itemsize)
    written = sum(prod(spec.shape) for spec in step.outputs) * results
    return sum(held) + raw + 2 * written + method.working_bytes(max(held)) + buffers


def _fate(info: TensorInfo, written: TensorSpec | None, step: Step) -> Fate:
    if written is None:
        return Fate(info.name, "drop", info.shape, None)
    changed = "copy" if written.dtype == info.dtype else "cast"
    return Fate(info.name, changed if step.layer is None else "convert", info.shape, written.shape)


def _identity(checkpoint: Checkpoint, recipe: Mapping[str, Any]) -> str:
    """Hash of the recipe, the config, and the headers, sizes and times of the source's files."""
    state = {
        "recipe": dict(recipe),
        "config": checkpoint.config,
        "files": {n: [f.size, f.mtime_ns] for n, f in checkpoint.files.items()},
        "tensors": [
            [i.name, str(i.dtype), i.shape, i.file, i.start] for i in checkpoint.tensors.values()
        ],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

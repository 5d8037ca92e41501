"""The plan of a conversion, from config.json and tensor headers alone.

What the plan says is what happens: the engine walks its steps and writes its shards, and the
shapes come from running the method itself on tensors without data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from convert.checkpoint.adapted import AdaptedCheckpoint
from convert.checkpoint.reader import CHUNK_BYTES, Checkpoint
from convert.checkpoint.safetensors_header import TensorInfo
from convert.facts import ModelFacts
from convert.methods import Method
from convert.resources import available_cores
from convert.scheme import Scheme
from convert.steps import Step, Steps, TensorSpec
from convert.targets import Target
from kvpatch.memory import KVCache

__all__ = ["Fate", "Plan", "Shard", "make_plan"]

# interpreter, torch and this package, resident: measured by benchmarks/convert.py, and 20 MB of
# buffers that were given back and not yet taken again, measured where threads wait for one another
RUNTIME_RAM = 290_000_000
# the same with transformers, which calibration runs and latents ask for frequencies
_TRANSFORMERS_RAM = 600_000_000


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
        method: What converts a unit of layers.
        target: What the result is written as.
        sources: For each layer the one whose keys and values it reads.
        before: KV cache of the source.
        after: KV cache of the result.
        left_out: Source tensors that are no part of the model.
        source_bytes: Bytes of all source tensors.
        peak_ram: Most resident memory the run takes, in bytes.
        plan_id: Hash of all that determines the result.
    """

    facts: ModelFacts
    shards: tuple[Shard, ...]
    method: Method
    target: Target
    sources: tuple[int, ...]
    before: KVCache
    after: KVCache
    left_out: tuple[TensorInfo, ...]
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
        """Fate of every source tensor, in file order; at last of those that are left out."""
        fates = []
        for shard in self.shards:
            for step in shard.steps:
                written = {spec.name: spec for spec in step.outputs}
                for name in step.inputs:
                    fates.append(_fate(tensors[name], written.get(name), step))
        return fates + [Fate(info.name, "drop", info.shape, None) for info in self.left_out]


def make_plan(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    scheme: Scheme,
    *,
    dtype: str | None,
    max_shard_bytes: int,
    windows: tuple[int, int] | None,
    identity: Mapping[str, Any],
    left_out: Sequence[TensorInfo],
    imported: bool,
) -> Plan:
    """Plan a conversion.

    Args:
        checkpoint: The open source; only its headers are used.
        facts: Its attention.
        scheme: What is to be done.
        dtype: Name of the dtype of all floating tensors of the result; None keeps each as it is.
        max_shard_bytes: Largest weight file, unless a single step needs more.
        windows: Number and tokens of the calibration windows; None if nothing is calibrated.
        identity: What determines the result beside the source, for the plan's identity.
        left_out: Source tensors that are no part of the model.
        imported: Whether transformers is in memory whatever the conversion does.

    Raises:
        InputModelError: If a tensor has no place in the result.
    """
    cast = getattr(torch, dtype) if dtype is not None else None
    method, target, sources = scheme.method, scheme.target, scheme.sources
    tensors = checkpoint.tensors
    steps = list(Steps(tensors, facts, method, target, sources, cast))
    working = max(_working_bytes(step, tensors, method) for step in steps)
    merging = checkpoint.merging_bytes if isinstance(checkpoint, AdaptedCheckpoint) else 0
    loads_transformers = imported or windows is not None or scheme.kv_heads is None
    if windows is not None:
        working = max(
            working,
            _calibration_bytes(
                facts, tensors, sources, scheme.kv_heads or facts.geometry.heads, windows
            ),
        )
    return Plan(
        facts=facts,
        shards=_shards(steps, max_shard_bytes),
        method=method,
        target=target,
        sources=sources,
        before=scheme.before or facts.cache(),
        after=scheme.cache,
        left_out=tuple(left_out),
        source_bytes=sum(info.nbytes for info in (*tensors.values(), *left_out)),
        peak_ram=working + merging + (_TRANSFORMERS_RAM if loads_transformers else RUNTIME_RAM),
        plan_id=_identity(checkpoint, identity),
    )


def _calibration_bytes(
    facts: ModelFacts,
    tensors: Mapping[str, TensorInfo],
    sources: Sequence[int],
    kv_heads: int,
    windows: tuple[int, int],
) -> int:
    """Memory of calibration: two streams, a unit of layers, moments, and scores of one KV head."""
    samples, context = windows
    geometry, unit = facts.geometry, max(sources.count(layer) for layer in sources)
    stream = 4 * samples * context * geometry.hidden
    # of all readers of a KV head, and of the KV heads that are refitted side by side
    at_once = min(kv_heads, available_cores())
    scores = 4 * samples * context**2 * (geometry.heads // kv_heads) * unit * at_once
    prefix = facts.family.layer_prefix.format(layer=0)
    layer = 4 * sum(prod(i.shape) for n, i in tensors.items() if n.startswith(prefix))
    embedding = 4 * max(prod(i.shape) for n, i in tensors.items() if not n.startswith(prefix))
    squares = 8 * (2 * unit + 3) * (geometry.hidden + 1) ** 2
    return max(embedding, (2 + unit) * layer + squares + 6 * scores) + (4 * unit + 10) * stream


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
            tuple(sorted(file, key=_width, reverse=True)),
        )
        for i, file in enumerate(files, 1)
    )


def _width(step: Step) -> int:
    return step.outputs[0].dtype.itemsize if step.outputs else 0


def _working_bytes(step: Step, tensors: Mapping[str, TensorInfo], method: Method) -> int:
    """Memory of a step: chunk buffers, and for a layer its tensors before and after."""
    buffers = 6 * CHUNK_BYTES
    if not step.layers:
        whole = sum(tensors[name].nbytes for name in step.inputs)
        made = [  # one output at a time
            spec.nbytes
            for spec, rewrite in zip(step.outputs, step.rewrites, strict=False)
            if rewrite.transform is not None and not rewrite.elementwise
        ]
        return buffers + (whole + 2 * max(made) if made else 0)
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
    if not step.layers and step.outputs:
        written = step.outputs[0]  # of several, the first stands for all
        changed = "copy" if written.dtype == info.dtype else "cast"
        action = "rewrite" if any(r.transform for r in step.rewrites) else changed
        return Fate(info.name, action, info.shape, written.shape)
    if written is not None:
        return Fate(info.name, "convert", info.shape, written.shape)
    elsewhere = {spec.name for spec in step.outputs} - set(step.inputs)
    return Fate(info.name, "convert" if elsewhere else "drop", info.shape, None)


def _identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> str:
    """Hash of all that is given, and of the source's config, headers, file sizes and times."""
    state = {
        "recipe": dict(identity),
        "config": checkpoint.config,
        "files": {n: [f.size, f.mtime_ns] for n, f in checkpoint.files.items()},
        "tensors": [
            [i.name, str(i.dtype), i.shape, i.file, i.start] for i in checkpoint.tensors.values()
        ],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

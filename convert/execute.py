"""Carrying out a plan: bytes from the source through the method into the shards of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.safetensors_header import tensor_bytes
from convert.checkpoint.staging import Staging
from convert.checkpoint.writer import FileRecord, ShardWriter
from convert.facts import ModelFacts
from convert.families import tensor_names, unpack
from convert.layer import AttentionLayer, LatentLayer
from convert.methods import Converted
from convert.plan import Plan, Shard
from convert.steps import Step, TensorSpec, emit
from kvpatch.errors import InputModelError, VerificationError

__all__ = ["execute", "read_attention", "read_layer", "read_unit"]

Progress = Callable[[int], None]
Transform = Callable[[Tensor], Tensor]


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    *,
    converted: Callable[[Step], Converted] | None,
    allow_nonfinite: bool,
    progress: Progress,
) -> dict[str, FileRecord]:
    """Write every shard that the journal does not have yet, and hash the source meanwhile.

    Args:
        plan: What to do.
        checkpoint: The open source.
        staging: Where shards and journal go.
        converted: Gives the unit of a step where something else converts it, such as calibration;
            None where the method does.
        allow_nonfinite: Copy tensors that hold NaN or infinity, instead of refusing them.
        progress: Called with the number of bytes of each piece written.

    Returns:
        Size and sha256 of every source file.

    Raises:
        InputModelError: If a source tensor holds NaN or infinity, or the source changed.
        VerificationError: If a finite source gives a result that is not.
        ResourceError: If the disk is full.
    """
    engine = _Engine(plan, checkpoint, staging, converted, allow_nonfinite, progress)
    with _one_torch_thread(), _hashing_source(checkpoint) as hashes:
        for shard in plan.shards:
            if shard.file in staging.finished:
                progress(sum(step.nbytes for step in shard.steps))
            else:
                engine.write(shard)
        digests = {file: future.result() for file, future in hashes.items()}
    for file in checkpoint.files:
        checkpoint.check_unchanged(file)
    return {
        file: FileRecord(checkpoint.files[file].size, digest) for file, digest in digests.items()
    }


@contextmanager
def _hashing_source(checkpoint: Checkpoint) -> Iterator[Mapping[str, Future[str]]]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="source-sha256")
    cancelled = Event()
    try:
        yield {file: pool.submit(checkpoint.sha256, file, cancelled) for file in checkpoint.files}
    finally:  # after an error nobody wants the hashes, and a shard takes seconds
        cancelled.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leave the cores to the threads that hash: torch's own would spin and take them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class _Engine:
    plan: Plan
    checkpoint: Checkpoint
    staging: Staging
    converted: Callable[[Step], Converted] | None
    allow_nonfinite: bool
    progress: Progress

    def write(self, shard: Shard) -> None:
        """Write one shard and journal it with the results of its layers."""
        header = [(spec.name, spec.dtype, spec.shape) for spec in shard.tensors]
        results: list[dict[str, Any]] = []
        with ShardWriter(self.staging.path / shard.file, header) as writer:
            for step in shard.steps:
                if step.layers:
                    results += self._convert(step, writer)
                elif step.constant is not None:
                    self._constant(step, step.constant, writer)
                else:
                    self._whole(step, writer)
            record = writer.finish()
        for file in {self.checkpoint.tensors[n].file for s in shard.steps for n in s.inputs}:
            self.checkpoint.check_unchanged(file)  # else a resumed run would trust this shard
        self.staging.record(shard.file, record, results)

    def _whole(self, step: Step, writer: ShardWriter) -> None:
        """Write all that becomes of one tensor that no layer takes."""
        for spec, rewrite in zip(step.outputs, step.rewrites, strict=True):
            if rewrite.transform is None or rewrite.elementwise:
                self._stream(step.inputs[0], spec, rewrite.transform, writer)
            else:
                self._rewrite(step.inputs[0], spec, rewrite.transform, writer)

    def _stream(
        self, name: str, spec: TensorSpec, transform: Transform | None, writer: ShardWriter
    ) -> None:
        """Copy one tensor piece by piece, or change its numbers on the way."""
        own = self.checkpoint.tensors[name].dtype
        for chunk in self.checkpoint.chunks(name):
            values = torch.frombuffer(chunk, dtype=own)
            finite = _is_finite(values)
            if not finite and not self.allow_nonfinite:
                raise _nonfinite_source(self.checkpoint, name)
            if own == spec.dtype and transform is None:
                writer.write(chunk)
            else:
                cast = (values if transform is None else transform(values)).to(spec.dtype)
                if finite:
                    _check_result(cast, spec)
                writer.write(tensor_bytes(cast))
            self.progress(len(chunk) * spec.dtype.itemsize // own.itemsize)

    def _rewrite(
        self, name: str, spec: TensorSpec, transform: Transform, writer: ShardWriter
    ) -> None:
        """Read one tensor as a whole, transform it, and write what comes out."""
        tensor = self.checkpoint.read(name)
        if not self.allow_nonfinite and not _is_finite(tensor):
            raise _nonfinite_source(self.checkpoint, name)
        self._write(spec, transform(tensor), writer, check=_is_finite(tensor))

    def _constant(self, step: Step, value: float, writer: ShardWriter) -> None:
        spec = step.outputs[0]
        self._write(spec, torch.full(spec.shape, value, dtype=spec.dtype), writer)

    def _convert(self, step: Step, writer: ShardWriter) -> list[dict[str, Any]]:
        """Run the method on a unit of layers, write what comes out, and return what it lost."""
        facts, method, target = self.plan.facts, self.plan.method, self.plan.target
        wanted = step.outputs[0].dtype
        before = read_unit(self.checkpoint, facts, step, wanted)
        layers = [layer for layer, _ in before]
        if self.converted is None:
            assert method.convert is not None
            after, results = method.convert(layers, None)
        else:
            after, results = self.converted(step)
        packed: dict[str, Tensor] = {}
        for index, (_, tensors), converted in zip(step.layers, before, after, strict=True):
            packed |= emit(converted, tensors, facts, target, index)
        for spec in step.outputs:
            self._write(spec, packed.pop(spec.name), writer)
        assert not packed, sorted(packed)
        return [
            {
                "layer": index,
                "source": self.plan.sources[index],
                **_heads(old, new),
                **result,
            }
            for index, old, new, result in zip(step.layers, layers, after, results, strict=True)
        ]

    def _write(
        self, spec: TensorSpec, values: Tensor, writer: ShardWriter, *, check: bool = True
    ) -> None:
        tensor = values.to(spec.dtype).contiguous()
        assert tuple(tensor.shape) == spec.shape, spec
        if check:
            _check_result(tensor, spec)
        writer.write(tensor_bytes(tensor))
        self.progress(spec.nbytes)


def _heads(old: AttentionLayer, new: AttentionLayer | LatentLayer) -> dict[str, Any]:
    """KV heads of a layer before and after, unless it has a latent."""
    if isinstance(new, LatentLayer):
        return {}
    return {"kv_heads": [old.geometry.kv_heads, new.geometry.kv_heads]}


def read_unit(
    checkpoint: Checkpoint, facts: ModelFacts, step: Step, dtype: torch.dtype
) -> list[tuple[AttentionLayer, dict[str, Tensor]]]:
    """Layers of a step in canonical form, each with its tensors by name.

    Args:
        checkpoint: The open source.
        facts: Its attention.
        step: One that converts layers.
        dtype: Of the result; narrower tensors are widened to it first.

    Raises:
        InputModelError: If a tensor holds NaN or infinity.
    """
    unit = []
    for layer in step.layers:
        prefix = facts.family.layer_prefix.format(layer=layer)
        names = [name for name in step.inputs if name.startswith(prefix)]
        unit.append(read_layer(checkpoint, facts, layer, names, dtype))
    return unit


def read_layer(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    layer: int,
    names: Iterable[str],
    dtype: torch.dtype | None = None,
) -> tuple[AttentionLayer, dict[str, Tensor]]:
    """One layer in canonical form, and its tensors by name.

    Args:
        checkpoint: The open source.
        facts: Its attention.
        layer: Decoder layer.
        names: Its tensors.
        dtype: Narrower tensors are widened to it first; None leaves all as they are.

    Raises:
        InputModelError: If a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = checkpoint.read(name)
        if not _is_finite(tensor):
            raise _nonfinite_source(checkpoint, name)
        wide = tensor.dtype if dtype is None else torch.promote_types(tensor.dtype, dtype)
        tensors[name] = tensor.to(wide)
    rope = facts.ropes[layer]
    return unpack(tensors, facts.family, facts.geometry, layer, rope=rope), tensors


def read_attention(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    layer: int,
    parts: Iterable[str],
    dtype: torch.dtype | None = None,
) -> AttentionLayer:
    """Some canonical fields of one layer; see ``read_layer``.

    Args:
        checkpoint: The open source.
        facts: Its attention.
        layer: Decoder layer.
        parts: The fields.
        dtype: See ``read_layer``.

    Raises:
        InputModelError: If a tensor holds NaN or infinity.
    """
    names = tensor_names(facts.family, facts.geometry, layer, parts)
    stored = [name for name in names if name in checkpoint.tensors]
    return read_layer(checkpoint, facts, layer, stored, dtype)[0]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates, and this is far faster than isfinite
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _nonfinite_source(checkpoint: Checkpoint, name: str) -> InputModelError:
    tensor = checkpoint.read(name)
    wrong = ~torch.isfinite(tensor)
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return InputModelError(
        f"{checkpoint.tensors[name].file}: {name!r} holds {int(wrong.sum()):,} values that are "
        f"NaN or infinite, the first at {list(first)}",
        hint="Use a sound checkpoint. --allow-nonfinite copies such tensors, but never converts "
        "attention weights that hold them.",
    )


def _check_result(tensor: Tensor, spec: TensorSpec) -> None:
    if not _is_finite(tensor):
        raise VerificationError(
            f"{spec.name!r} overflows in {str(spec.dtype).removeprefix('torch.')}",
            hint="Choose --dtype bfloat16 or float32.",
        )

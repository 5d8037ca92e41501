"""Calibrated conversion: layer after layer, with text running through the model meanwhile.

Two streams of hidden states go through the decoder. The first is that of the original model: it
gives the second moments of the attention's inputs, the scores and the outputs that a converted
layer should reproduce. The second runs through the layers converted so far, so that each refit also
repairs what earlier layers lost. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.decoder import Decoder
from convert.execute import read_unit
from convert.layer import AttentionLayer, Geometry
from convert.methods import Converted
from convert.methods.attention import Scoring, keys, plane_order, values, with_head_order
from convert.methods.fitting import (
    Observed,
    Shared,
    head_outputs,
    projected,
    refit_outcome,
    refit_projections,
    row_divergence,
    second_moments,
    similarity,
    token_gram,
)
from convert.plan import Plan
from convert.steps import Step
from kvpatch.errors import InputModelError

__all__ = ["Calibration"]

_SIMILARITY = "similarity"
_SMALL = 1024  # hidden width
_WEIGHTS = tuple(
    field.name
    for field in dataclasses.fields(AttentionLayer)
    if field.name not in {"geometry", "rope"}
)


@dataclass(slots=True)
class _Streams:
    """Hidden states [N, T, E] before the layer at hand, in the original and the converted model."""

    original: Tensor
    converted: Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Converts all units of a plan and keeps them on disk until they are written.

    Args:
        plan: What to do.
        checkpoint: The open source.
        scratch: Where finished units go; those found there are not converted again.
        tokens: [N, T] calibration windows.
        refit_scores: Refit query and key projections.
        refit_output: Refit output projections.
        seed: Of everything random.
        device: Where the layers run and refits are computed.
    """

    plan: Plan
    checkpoint: Checkpoint
    scratch: Scratch
    tokens: Tensor
    refit_scores: bool
    refit_output: bool
    seed: int
    device: str

    @torch.no_grad()
    def run(self, progress: Callable[[int], None]) -> None:
        """Convert all units; afterwards ``unit`` has each of them.

        Args:
            progress: Called with the number of layers just done.

        Raises:
            InputModelError: If the model cannot be run, or gives numbers that are not finite.
        """
        steps = {step.layers: step for shard in self.plan.shards for step in shard.steps}
        units = sorted(unit for unit in steps if unit)
        if self.scratch.has(_SIMILARITY):
            return
        facts = self.plan.facts
        grams: list[Tensor] = []
        with _threads_for(facts.geometry.hidden):
            tokens = self.tokens.shape[1]
            decoder = Decoder(self.checkpoint, facts, context=tokens, device=self.device)
            embedded = decoder.embed(self.tokens)
            streams = _Streams(embedded, embedded.clone())
            for unit in units:
                grams += self._convert(steps[unit], decoder, streams)
                progress(len(unit))
        self.scratch.keep(_SIMILARITY, {}, similarity(grams))

    def similarity(self) -> list[list[float]]:
        """How alike the attention inputs of each two layers are: see ``similarity``."""
        matrix: list[list[float]] = self.scratch.load(_SIMILARITY)[1]
        return matrix

    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layers of a unit and what each of them lost."""
        tensors, (geometries, results) = self.scratch.load(_name(layers))
        converted = []
        for layer, geometry in zip(layers, geometries, strict=True):
            fields = {n: tensors.get(f"{layer}.{n}") for n in _WEIGHTS}
            rope = self.plan.facts.ropes[layer]
            converted.append(AttentionLayer(geometry=Geometry(**geometry), rope=rope, **fields))
        return converted, results

    def _convert(self, step: Step, decoder: Decoder, streams: _Streams) -> list[Tensor]:
        """Convert the layers of a unit and lead both streams through them.

        Returns:
            Of each layer what ``similarity`` needs.
        """
        unit, dtype = step.layers, step.outputs[0].dtype
        before = [item for item, _ in read_unit(self.checkpoint, self.plan.facts, step, dtype)]
        seen = [
            self._observe(layer, item, decoder, streams)
            for layer, item in zip(unit, before, strict=True)
        ]
        done = self.scratch.has(_name(unit))
        converted, results = (
            self.unit(unit)
            if done
            else self.plan.method.convert(before, second_moments([item.inputs for item in seen]))
        )
        seen = [
            dataclasses.replace(item, query_order=_query_order(item.layer.geometry, result))
            for item, result in zip(seen, results, strict=True)
        ]
        after, shared, measured = list(converted), None, []
        for place, layer in enumerate(unit):
            with decoder.block(layer) as block:
                inputs = block.attention_inputs(streams.converted)
                if self.refit_scores and not done:
                    after = self._refit_scores(place, seen, after, inputs, shared)
                if shared is None:
                    shared = self._shared(after[0], seen[0].scoring, inputs)
                if self.refit_output and not done:
                    target = self._output_target(seen[place], streams)
                    after = self._refit_outcome(
                        place, seen, after, inputs=inputs, shared=shared, target=target
                    )
                if place == 0:
                    shared = self._shared(after[0], seen[0].scoring, inputs)
                ready = self._ready(after[place])
                heads = head_outputs(ready, seen[place].scoring, inputs, shared)
                outputs = projected(ready, heads)
                if not done:
                    measured.append(
                        {
                            "attention_kl": row_divergence(
                                seen[place], ready, seen[place].scoring, inputs, shared
                            ),
                            "output_error": _error(outputs, seen[place].outputs),
                        }
                    )
                streams.converted = block.run_all_with(streams.converted, outputs)
        if not done:
            self._keep(unit, after, [{**r, **m} for r, m in zip(results, measured, strict=True)])
        return [token_gram(item.inputs) for item in seen]

    def _observe(
        self, layer: int, original: AttentionLayer, decoder: Decoder, streams: _Streams
    ) -> Observed:
        """Lead the original stream through a layer and take down what its attention does."""
        before = streams.original
        with decoder.block(layer) as block:
            after, inputs, outputs = block.run_all(before)
        if not torch.isfinite(after).all():
            raise InputModelError(f"layer {layer} gives NaN or infinity on the calibration text")
        streams.original = after
        return Observed(
            layer=self._ready(original),
            scoring=self._scoring(layer, decoder),
            query_order=(),
            before=before,
            inputs=inputs,
            outputs=outputs,
        )

    def _scoring(self, layer: int, decoder: Decoder) -> Scoring:
        facts = self.plan.facts
        tokens = torch.arange(self.tokens.shape[1])
        distance = tokens[:, None] - tokens
        visible = (distance >= 0) & (distance < (facts.windows[layer] or len(tokens)))
        return Scoring(
            visible=visible.to(self.device),
            turn=decoder.turn(layer).to(self.device),
            scale=facts.scales[layer],
            softcap=facts.softcap,
            clip=facts.clip,
            norm=facts.qk_norm,
            norm_eps=facts.norm_eps,
        )

    def _refit_scores(
        self,
        place: int,
        seen: Sequence[Observed],
        after: Sequence[AttentionLayer],
        inputs: Tensor,
        shared: Shared | None,
    ) -> list[AttentionLayer]:
        ready = [self._ready(layer) for layer in after]
        fitted = refit_projections(
            place, seen, ready, inputs, shared, each=_side_by_side, seed=self.seed
        )
        return [self._stored(new, like=old) for new, old in zip(fitted, after, strict=True)]

    def _refit_outcome(
        self,
        place: int,
        seen: Sequence[Observed],
        after: Sequence[AttentionLayer],
        *,
        inputs: Tensor,
        shared: Shared,
        target: Tensor,
    ) -> list[AttentionLayer]:
        ready = [self._ready(layer) for layer in after]
        fitted = refit_outcome(
            place, seen, ready, inputs=inputs, shared=shared, target=target, seed=self.seed
        )
        return [self._stored(new, like=old) for new, old in zip(fitted, after, strict=True)]

    def _shared(self, layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Shared:
        ready = self._ready(layer)
        return keys(ready, scoring, inputs), values(ready, scoring, inputs)

    def _output_target(self, seen: Observed, streams: _Streams) -> Tensor:
        """What the attention should add for the streams to agree after it."""
        if self.plan.facts.family.attention_residual == "normed":
            return seen.outputs
        behind = seen.before - streams.converted
        return seen.outputs + behind / self.plan.facts.residual_multiplier

    def _ready(self, layer: AttentionLayer) -> AttentionLayer:
        """A layer to compute with: float32, on the device, heads in plane order."""
        return _mapped(
            with_head_order(layer, plane_order(layer)), lambda t, _: t.to(self.device).float()
        )

    def _stored(self, layer: AttentionLayer, *, like: AttentionLayer) -> AttentionLayer:
        """A layer as it is written: in the dtypes and the order of ``like``."""
        back = with_head_order(layer, plane_order(layer).argsort().to(self.device))
        return _mapped(back, lambda t, name: t.cpu().to(getattr(like, name).dtype))

    def _keep(self, unit: tuple[int, ...], after: Sequence[AttentionLayer], results: Any) -> None:
        tensors = {
            f"{layer}.{name}": getattr(item, name).contiguous()
            for layer, item in zip(unit, after, strict=True)
            for name in _WEIGHTS
            if getattr(item, name) is not None
        }
        geometries = [dataclasses.asdict(item.geometry) for item in after]
        self.scratch.keep(_name(unit), tensors, [geometries, results])


@contextmanager
def _threads_for(hidden: int) -> Iterator[None]:
    """One torch thread for small models: sharing their operations out costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if hidden < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _side_by_side(function: Callable[[int], None], numbers: range) -> None:
    """Call a function for each number on all cores, each with one torch thread of its own.

    So the result does not depend on the number of cores.
    """
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in [pool.submit(function, number) for number in numbers]:
                done.result()
        finally:
            torch.set_num_threads(threads)


def _name(unit: Sequence[int]) -> str:
    return f"layer-{unit[0]:05d}"


def _query_order(before: Geometry, result: Mapping[str, Any]) -> tuple[int, ...]:
    """Original query heads in the order in which a converted layer has them."""
    groups = result.get("groups")
    members = range(before.kv_heads) if groups is None else [m for group in groups for m in group]
    return tuple(
        head
        for member in members
        for head in range(member * before.group, (member + 1) * before.group)
    )


def _mapped(layer: AttentionLayer, function: Callable[[Tensor, str], Tensor]) -> AttentionLayer:
    fields: dict[str, Any] = {
        name: function(getattr(layer, name), name)
        for name in _WEIGHTS
        if getattr(layer, name) is not None
    }
    return dataclasses.replace(layer, **fields)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Squared error relative to the power of what was wanted."""
    power = float(wanted.double().square().sum())
    return float((found - wanted).double().square().sum()) / power if power else 0.0

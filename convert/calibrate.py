"""Calibrated merges: KV heads of a layer, or of layers that share them, on a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from convert.decoder import Decoder
from convert.execute import read_unit
from convert.layer import AttentionLayer, Geometry
from convert.methods import Converted
from convert.methods.attention import Scoring, keys, queries, values
from convert.methods.fitting import (
    Observed,
    Shared,
    head_outputs,
    projected,
    refit_outcome,
    refit_projections,
    row_divergence,
    second_moments,
    steps_of_fits,
)
from convert.methods.similarity import token_gram
from convert.progress import LayerProgress
from convert.steps import Step
from convert.streams import (
    AFTER,
    INPUTS,
    MERGED,
    OUTCOME,
    SCORES,
    WEIGHTS,
    Converting,
    Streams,
    checked,
    relative_error,
    side_by_side,
    unit_name,
)

__all__ = ["Calibration"]


@dataclass(frozen=True, slots=True)
class Calibration(Converting):
    """Merges with the moments of the text, and refits."""

    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layers of a unit and what each of them lost."""
        tensors, (geometries, results) = self.scratch.load(unit_name(layers))
        converted = []
        for layer, geometry in zip(layers, geometries, strict=True):
            fields = {n: tensors.get(f"{layer}.{n}") for n in WEIGHTS}
            rope = self.plan.facts.ropes[layer]
            converted.append(AttentionLayer(geometry=Geometry(**geometry), rope=rope, **fields))
        return converted, results

    def convert(
        self, step: Step, decoder: Decoder, streams: Streams, work: LayerProgress
    ) -> list[Tensor]:
        """Convert the layers of a unit and lead both streams through them."""
        unit, dtype = step.layers, step.outputs[0].dtype
        before = [item for item, _ in read_unit(self.checkpoint, self.plan.facts, step, dtype)]
        seen = [
            self.observe(layer, item, decoder, streams, work)
            for layer, item in zip(unit, before, strict=True)
        ]
        done = self.scratch.has(unit_name(unit))
        assert self.plan.method.convert is not None
        converted, results = (
            self.unit(unit)
            if done
            else self.plan.method.convert(before, second_moments([item.inputs for item in seen]))
        )
        seen = [
            dataclasses.replace(item, query_order=_query_order(item.layer.geometry, result))
            for item, result in zip(seen, results, strict=True)
        ]
        work.ticks(len(unit) * MERGED)()
        after, shared, measured = checked(unit, list(converted)), None, []
        windows = len(self.tokens)
        for place, layer in enumerate(unit):
            with decoder.block(layer) as block:
                inputs = block.attention_inputs(streams.converted, work.ticks(INPUTS, windows))
                if self.refit_scores and not done:
                    after = self._refit_scores(place, seen, after, inputs, shared, work=work)
                    after = checked(unit, after)
                if shared is None:
                    shared = self._shared(after[0], seen[0].scoring, inputs)
                scoring = seen[place].scoring
                asked = queries(self.ready(after[place]), scoring, inputs)
                if self.refit_output and not done:
                    target = self.output_target(seen[place], streams)
                    after = self._refit_outcome(
                        place, seen, after, asked, inputs=inputs, shared=shared, target=target
                    )
                    after = checked(unit, after)
                    work.ticks(OUTCOME)()
                if place == 0:
                    shared = self._shared(after[0], seen[0].scoring, inputs)
                heads = head_outputs(asked, scoring, shared)
                outputs = projected(self.ready(after[place]), heads)
                if not done:
                    measured.append(
                        {
                            "attention_kl": row_divergence(seen[place], asked, scoring, shared),
                            "output_error": relative_error(outputs, seen[place].outputs),
                        }
                    )
                streams.converted = block.run_all_with(
                    streams.converted, outputs, work.ticks(AFTER, windows)
                )
        if not done:
            self._keep(unit, after, [{**r, **m} for r, m in zip(results, measured, strict=True)])
        return [token_gram(item.inputs) for item in seen]

    def _refit_scores(
        self,
        place: int,
        seen: Sequence[Observed],
        after: Sequence[AttentionLayer],
        inputs: Tensor,
        shared: Shared | None,
        *,
        work: LayerProgress,
    ) -> list[AttentionLayer]:
        ready = [self.ready(layer) for layer in after]
        steps = steps_of_fits(place, len(seen), ready[place].geometry.kv_heads)
        fitted = refit_projections(
            place,
            seen,
            ready,
            inputs,
            shared,
            each=partial(side_by_side, work=work),
            seed=self.seed,
            tick=work.ticks(SCORES, steps),
        )
        return [self.stored(new, like=old) for new, old in zip(fitted, after, strict=True)]

    def _refit_outcome(
        self,
        place: int,
        seen: Sequence[Observed],
        after: Sequence[AttentionLayer],
        asked: Tensor,
        *,
        inputs: Tensor,
        shared: Shared,
        target: Tensor,
    ) -> list[AttentionLayer]:
        ready = [self.ready(layer) for layer in after]
        fitted = refit_outcome(
            place, seen, ready, asked=asked, inputs=inputs, shared=shared, target=target
        )
        return [self.stored(new, like=old) for new, old in zip(fitted, after, strict=True)]

    def _shared(self, layer: AttentionLayer, scoring: Scoring, inputs: Tensor) -> Shared:
        ready = self.ready(layer)
        return keys(ready, scoring, inputs), values(ready, scoring, inputs)

    def _keep(self, unit: tuple[int, ...], after: Sequence[AttentionLayer], results: Any) -> None:
        tensors = {
            f"{layer}.{name}": getattr(item, name).contiguous()
            for layer, item in zip(unit, after, strict=True)
            for name in WEIGHTS
            if getattr(item, name) is not None
        }
        geometries = [dataclasses.asdict(item.geometry) for item in after]
        self.scratch.keep(unit_name(unit), tensors, [geometries, results])


def _query_order(before: Geometry, result: Mapping[str, Any]) -> tuple[int, ...]:
    """Original query heads in the order in which a converted layer has them."""
    groups = result.get("groups")
    members = range(before.kv_heads) if groups is None else [m for group in groups for m in group]
    return tuple(
        head
        for member in members
        for head in range(member * before.group, (member + 1) * before.group)
    )

"""Conversion to latents, unit by unit: calibrated on a text, or from the weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.execute import read_unit
from convert.facts import ModelFacts
from convert.latent_choice import LatentChoice
from convert.layer import AttentionLayer, LatentGeometry, LatentLayer
from convert.methods import Converted
from convert.methods.attention import Scoring, queries
from convert.methods.fitting import (
    Observed,
    head_outputs,
    projected,
    refit_outcome,
    row_divergence,
    second_moments,
)
from convert.methods.joint import complete, reader, shares_of
from convert.methods.refit_latent import (
    Reading,
    expanded,
    latent_basis,
    refit_latent_scores,
    shared_by,
    with_expanded_values,
)
from convert.methods.refit_scores import STEPS
from convert.methods.similarity import token_gram
from convert.plan import Plan
from convert.progress import LayerProgress
from convert.steps import Step
from convert.streams import (
    AFTER,
    INPUTS,
    MERGED,
    OUTCOME,
    SCORES,
    Converting,
    Streams,
    checked,
    relative_error,
    side_by_side,
    unit_name,
)
from convert.targets.dense_blocks import stock_config
from convert.targets.rope_tables import rope_table

__all__ = ["LatentConverting", "latent_unit"]

_TENSORS = tuple(
    field.name
    for field in dataclasses.fields(LatentLayer)
    if field.name not in {"geometry", "planes", "scale"}
)


@dataclass(frozen=True, slots=True)
class LatentConverting(Converting):
    """Conversion to latents on a text, with refits.

    Args:
        choice: What was decided for all layers.
    """

    choice: LatentChoice

    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layers of a unit and what each of them lost."""
        tensors, facts = self.scratch.load(unit_name(layers))
        converted, results = [], []
        for number, (geometry, planes, scale, result) in zip(layers, facts, strict=True):
            fields: dict[str, Any] = {name: tensors.get(f"{number}.{name}") for name in _TENSORS}
            converted.append(
                LatentLayer(
                    geometry=LatentGeometry(**geometry),
                    planes=tuple(planes),
                    scale=scale,
                    **fields,
                )
            )
            results.append(result)
        return converted, results

    def convert(
        self, step: Step, decoder: Decoder, streams: Streams, work: LayerProgress
    ) -> list[Tensor]:
        """Convert the layers of a unit and lead both streams through them."""
        unit = step.layers
        before = read_unit(self.checkpoint, self.plan.facts, step, torch.float32)
        seen = [
            self.observe(number, original, decoder, streams, work)
            for number, (original, _) in zip(unit, before, strict=True)
        ]
        done = self.scratch.has(unit_name(unit))
        if done:
            (first, *others), _ = self.unit(unit)
            exact = [first, *(complete(layer, first) for layer in others)]
            results: list[dict[str, Any]] = []
        else:
            exact, results = self.choice.convert(
                unit,
                [original for original, _ in before],
                second_moments([one.inputs for one in seen]),
                shares=shares_of(seen),
                scales=[one.scoring.scale for one in seen],
                factor=_rotary_factor(self.plan.facts, unit[0]),
            )
        work.ticks(len(unit) * MERGED)()
        windows = len(self.tokens)
        refitted = self.refit_scores or self.refit_output
        layers = checked(unit, [_mapped(layer, self.device) for layer in exact])
        exact = [] if refitted else exact
        scorings = [_latent_scoring(one, layers[0]) for one in seen]
        for place, number in enumerate(unit):
            with decoder.block(number) as block:
                inputs = block.attention_inputs(streams.converted, work.ticks(INPUTS, windows))
            # a layer weighs as much as all that refits need beside it, so it is read again later
            if place == 0:
                source = inputs
            if self.refit_scores and not done:
                readings = [
                    Reading(
                        layer=layer,
                        observed=one,
                        scoring=scoring,
                        inputs=inputs if at == place else one.inputs,
                    )
                    for at, (layer, one, scoring) in enumerate(
                        zip(layers, seen, scorings, strict=True)
                    )
                ]
                tick = work.ticks(SCORES, _fits(readings, place))
                layers = refit_latent_scores(
                    readings,
                    source,
                    place=place,
                    each=partial(side_by_side, work=work, tick=tick),
                    seed=self.seed,
                )
                layers = checked(unit, layers)
            one = dataclasses.replace(seen[place], scoring=scorings[place])
            ready = expanded(layers[place])
            asked = queries(ready, one.scoring, inputs)
            if self.refit_output and not done:
                target = self.output_target(one, streams)
                layers[place], ready = self._refit_outcome(
                    layers[place], ready, one, asked, inputs=inputs, source=source, target=target
                )
                layers = checked(unit, layers)
                work.ticks(OUTCOME)()
            shared = shared_by(layers[place], one.scoring, source)
            outputs = projected(ready, head_outputs(asked, one.scoring, shared))
            with decoder.block(number) as block:
                streams.converted = block.run_all_with(
                    streams.converted, outputs, work.ticks(AFTER, windows)
                )
            if not done:
                results[place] |= {
                    "attention_kl": row_divergence(seen[place], asked, one.scoring, shared),
                    "output_error": relative_error(outputs, one.outputs),
                }
        if not done:
            self._keep(unit, layers if refitted else exact, results)
        return [token_gram(one.inputs) for one in seen]

    def _refit_outcome(
        self,
        layer: LatentLayer,
        ready: AttentionLayer,
        seen: Observed,
        asked: Tensor,
        *,
        inputs: Tensor,
        source: Tensor,
        target: Tensor,
    ) -> tuple[LatentLayer, AttentionLayer]:
        """The layer with new values and output, and its expanded form."""
        basis = latent_basis(layer, source)
        (fitted,) = refit_outcome(
            0,
            [seen],
            [ready],
            asked=asked,
            inputs=inputs,
            shared=shared_by(layer, seen.scoring, source),
            target=target,
            basis=basis,
            read=source,
        )
        return with_expanded_values(layer, fitted, basis), fitted

    def _keep(
        self, unit: tuple[int, ...], layers: Sequence[LatentLayer], results: Sequence[Any]
    ) -> None:
        stored = [layers[0], *(reader(layer) for layer in layers[1:])]
        tensors = {
            f"{number}.{name}": getattr(layer, name).cpu().contiguous()
            for number, layer in zip(unit, stored, strict=True)
            for name in _TENSORS
            if getattr(layer, name) is not None
        }
        facts = [
            [dataclasses.asdict(layer.geometry), layer.planes, layer.scale, result]
            for layer, result in zip(stored, results, strict=True)
        ]
        self.scratch.keep(unit_name(unit), tensors, facts)


def latent_unit(
    step: Step, *, plan: Plan, checkpoint: Checkpoint, choice: LatentChoice
) -> Converted:
    """The layers of a step, from the weights alone."""
    layers = [layer for layer, _ in read_unit(checkpoint, plan.facts, step, torch.float32)]
    converted, results = choice.convert(
        step.layers,
        layers,
        None,
        shares=[1.0] * len(layers),
        scales=[plan.facts.scales[number] for number in step.layers],
        factor=_rotary_factor(plan.facts, step.layers[0]),
    )
    return [converted[0], *(reader(layer) for layer in converted[1:])], results


def _latent_scoring(seen: Observed, layer: LatentLayer) -> Scoring:
    """How a latent layer turns scores into weights."""
    turn = seen.scoring.turn
    # pairs of a layer without positions are zero, however they turn
    idle = turn.new_ones(len(turn), len(layer.planes))
    kept = turn[:, list(layer.planes)] if turn.shape[1] else idle
    return dataclasses.replace(seen.scoring, turn=kept)


def _fits(readings: Sequence[Reading], place: int) -> int:
    """How many fits of a head ``refit_latent_scores`` comes to."""
    first = readings[place].layer
    heads = first.geometry.heads
    if place:
        return 2 * heads
    rotary = STEPS + 2 if len(first.k_rope) else 0
    return ((1 + rotary) * len(readings) + 1) * heads


def _rotary_factor(facts: ModelFacts, number: int) -> float:
    """Factor on the cosines and sines of a layer, where a scaled RoPE has one."""
    rope = facts.ropes[number]
    if not rope.dim or rope.kind == "default":
        return 1.0
    return rope_table(facts, stock_config(facts), number).attention_factor


def _mapped(layer: LatentLayer, device: str) -> LatentLayer:
    """A layer to compute with: float32, on the device."""
    fields: dict[str, Any] = {
        name: getattr(layer, name).to(device).float()
        for name in _TENSORS
        if getattr(layer, name) is not None
    }
    return dataclasses.replace(layer, **fields)

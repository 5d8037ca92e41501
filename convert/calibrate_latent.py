"""Conversion to latents, layer by layer: calibrated on a text, or from the weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.execute import read_unit
from convert.facts import ModelFacts
from convert.latents import Sizes, placeholder_planes, sizes_of
from convert.layer import AttentionLayer, LatentGeometry, LatentLayer, QkNorm
from convert.methods import Converted
from convert.methods.attended import Attended
from convert.methods.cut import kept_components, lost_without_turn
from convert.methods.fitting import (
    head_outputs,
    projected,
    refit_outcome,
    row_divergence,
    second_moments,
    token_gram,
)
from convert.methods.latent import (
    factored,
    latent_form,
    still_keys,
    value_gram,
    with_idle_pairs,
)
from convert.methods.normed import factored_whole, normed_form
from convert.methods.refit_latent import (
    expanded,
    latent_basis,
    refit_latent_scores,
    shared_by,
    with_expanded_values,
)
from convert.plan import Plan
from convert.recipe import MlaRecipe
from convert.steps import Step
from convert.streams import Converting, Streams, relative_error, side_by_side, unit_name
from convert.survey import look, survey, white
from convert.targets.deepseek import deepseek_problem
from convert.targets.dense_blocks import stock_config
from convert.targets.rope_tables import rope_table

__all__ = ["LatentChoice", "LatentConverting", "choose_latents", "latent_unit"]

_TENSORS = tuple(
    field.name
    for field in dataclasses.fields(LatentLayer)
    if field.name not in {"geometry", "planes", "scale"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentChoice:
    """What was decided for all layers.

    Args:
        attended: What attention makes of the keys of each layer.
        kept: For each layer [P, n], true where a component of the keys stays rotary.
        ranks: Latent dims of each layer.
        constants: Whether the result can hold biases; else means are left in the latent.
        norm: Of queries and keys.
    """

    attended: Sequence[Attended]
    kept: Sequence[Tensor]
    ranks: Sequence[int]
    constants: bool
    norm: QkNorm | None

    @property
    def planes(self) -> list[tuple[int, ...]]:
        """For each layer the RoPE plane of each pair of the rotary key.

        A layer without positions among others has pairs too, which are zero.
        """
        own = [tuple(kept.nonzero()[:, 0].tolist()) for kept in self.kept]
        idle = next(filter(None, own), ())
        return [planes or idle for planes in own]

    def convert(
        self, number: int, layer: AttentionLayer, moment: Tensor, *, scale: float, factor: float
    ) -> tuple[LatentLayer, dict[str, Any]]:
        """One layer, without refits, and what it lost.

        Args:
            number: Which layer.
            layer: The original.
            moment: [E', E'] second moment of [x; 1].
            scale: Factor on its scores.
            factor: Of its rotation, where a scaled RoPE has one.
        """
        rows, components = look(layer, moment, self.norm)
        attended, kept = self.attended[number], self.kept[number]
        still = still_keys(rows, components, attended.turn, kept, factor**2)
        factor_them = partial(factored, centred=self.constants)
        found = (factor_them if self.norm is None else factored_whole)(
            still,
            rows.v,
            key_metric=attended.queries * scale**2,
            value_gram=value_gram(layer, attended.values),
            moment=moment,
            rank=self.ranks[number],
        )
        lost = lost_without_turn(attended)
        results = {
            "rank": self.ranks[number],
            "rope_dims": 2 * int(kept.sum()),
            "lost_energy_rope": _share(float(lost[~kept].sum()), float(attended.energy.sum())),
            "lost_energy_latent": _share(found.lost, found.energy),
        }
        form = latent_form if self.norm is None else normed_form
        converted = form(layer, rows, components, kept=kept, factored=found, scale=scale)
        if not converted.planes and self.planes[number]:
            converted = with_idle_pairs(converted, self.planes[number])
        return converted, results


def choose_latents(
    recipe: MlaRecipe,
    facts: ModelFacts,
    checkpoint: Checkpoint,
    *,
    tokens: Tensor | None,
    to_write: bool,
    progress: Callable[[int], None],
) -> tuple[Sizes, Sequence[Sequence[int]], LatentChoice | None]:
    """Sizes, and for each layer what stays rotary.

    Args:
        recipe: Settled.
        facts: The source.
        checkpoint: The open source.
        tokens: [N, T] calibration windows, or None.
        to_write: Choose components; else the planes are placeholders, unless sizes must be chosen.
        progress: Called with the number of layers just looked at.

    Raises:
        UsageError: If the model cannot have such sizes.
    """
    splits = sizes_of(recipe, facts)
    if len(splits) == 1 and not to_write:
        return splits[0], placeholder_planes(recipe, facts, splits[0]), None
    attended, predicted = survey(
        checkpoint, facts, tokens=tokens, device=recipe.device, splits=splits, progress=progress
    )
    sizes = splits[predicted.index(min(predicted))]
    kept = kept_components(
        [lost_without_turn(layer) for layer in attended],
        sizes.rope_dims // 2,
        recipe.rope_select,
        common=recipe.target != "kvpatch" and deepseek_problem(facts, [0]) is None,
    )
    ranks = [sizes.rank] * facts.layers
    choice = LatentChoice(
        attended=attended,
        kept=kept,
        ranks=ranks,
        constants=not recipe.serving,
        norm=facts.qk_norm,
    )
    return sizes, choice.planes, choice


@dataclass(frozen=True, slots=True)
class LatentConverting(Converting):
    """Conversion to latents on a text, with refits.

    Args:
        choice: What was decided for all layers.
    """

    choice: LatentChoice

    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layer of a unit and what it lost."""
        tensors: dict[str, Any]
        tensors, (geometry, planes, scale, result) = self.scratch.load(unit_name(layers))
        layer = LatentLayer(
            geometry=LatentGeometry(**geometry),
            planes=tuple(planes),
            scale=scale,
            **tensors,
        )
        return [layer], [result]

    def convert(self, step: Step, decoder: Decoder, streams: Streams) -> list[Tensor]:
        """Convert a layer and lead both streams through it."""
        (number,) = step.layers
        ((original, _),) = read_unit(self.checkpoint, self.plan.facts, step, torch.float32)
        seen = self.observe(number, original, decoder, streams)
        turn = seen.scoring.turn
        done = self.scratch.has(unit_name(step.layers))
        if done:
            (layer,), _ = self.unit(step.layers)
        else:
            layer, result = self.choice.convert(
                number,
                original,
                second_moments([seen.inputs]).own[0],
                scale=seen.scoring.scale,
                factor=_rotary_factor(self.plan.facts, number),
            )
        exact, layer = layer, _mapped(layer, self.device)
        # pairs of a layer without positions are zero, however they turn
        idle = turn.new_ones(len(turn), len(layer.planes))
        kept = turn[:, list(layer.planes)] if turn.shape[1] else idle
        scoring = dataclasses.replace(seen.scoring, turn=kept)
        with decoder.block(number) as block:
            inputs = block.attention_inputs(streams.converted)
            if self.refit_scores and not done:
                layer = refit_latent_scores(
                    layer, seen, scoring, inputs, each=side_by_side, seed=self.seed
                )
            if self.refit_output and not done:
                layer = self._refit_outcome(layer, seen, scoring, inputs, streams)
            ready = expanded(layer)
            shared = shared_by(layer, ready, scoring, inputs)
            outputs = projected(ready, head_outputs(ready, scoring, inputs, shared))
            streams.converted = block.run_all_with(streams.converted, outputs)
        if not done:
            result |= {
                "attention_kl": row_divergence(seen, ready, scoring, inputs, shared),
                "output_error": relative_error(outputs, seen.outputs),
            }
            refitted = self.refit_scores or self.refit_output
            self._keep(step.layers, layer if refitted else exact, result)
        return [token_gram(seen.inputs)]

    def _refit_outcome(
        self, layer: LatentLayer, seen: Any, scoring: Any, inputs: Tensor, streams: Streams
    ) -> LatentLayer:
        ready, basis = expanded(layer), latent_basis(layer, inputs)
        (fitted,) = refit_outcome(
            0,
            [dataclasses.replace(seen, scoring=scoring)],
            [ready],
            inputs=inputs,
            shared=shared_by(layer, ready, scoring, inputs),
            target=self.output_target(seen, streams),
            seed=self.seed,
            basis=basis,
        )
        return with_expanded_values(layer, fitted, basis)

    def _keep(self, unit: tuple[int, ...], layer: LatentLayer, result: Any) -> None:
        tensors = {
            name: getattr(layer, name).cpu().contiguous()
            for name in _TENSORS
            if getattr(layer, name) is not None
        }
        facts = [dataclasses.asdict(layer.geometry), layer.planes, layer.scale, result]
        self.scratch.keep(unit_name(unit), tensors, facts)


def latent_unit(
    step: Step, *, plan: Plan, checkpoint: Checkpoint, choice: LatentChoice
) -> Converted:
    """The layer of a step, from the weights alone."""
    (number,) = step.layers
    ((layer, _),) = read_unit(checkpoint, plan.facts, step, torch.float32)
    moment = white(plan.facts.geometry.hidden)
    scale, factor = plan.facts.scales[number], _rotary_factor(plan.facts, number)
    converted, result = choice.convert(number, layer, moment, scale=scale, factor=factor)
    return [converted], [result]


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


def _share(part: float, whole: float) -> float:
    return max(0.0, part) / whole if whole > 0 else 0.0

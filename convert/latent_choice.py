"""What a conversion to latents decides for all layers: sizes, what stays rotary, who shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.facts import ModelFacts
from convert.latent_sizes import Sizes, budget_of, most_dims
from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attended import Attended
from convert.methods.budget import Prospect, distributed
from convert.methods.cut import kept_components, lost_without_turn
from convert.methods.joint import (
    factored_jointly,
    joint,
    lost_in_latent,
    lost_with_turn,
    parts_of,
    unpredicted,
)
from convert.methods.latent import latent_form, still_keys, with_idle_pairs
from convert.methods.merge import Inputs
from convert.methods.mixing import Mixture
from convert.methods.normed import normed_form
from convert.quantities import parse_budget
from convert.recipe import MlaRecipe
from convert.steps import units_of
from convert.survey import survey
from convert.targets.deepseek import deepseek_problem

__all__ = ["LatentChoice", "choose_latents"]

# shares of the numbers of a layer, were all equal, for which pairs are compared
_PARTS = (0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentChoice:
    """What was decided for all layers.

    Args:
        sources: For each layer the one whose latent it reads.
        mixtures: By the first layer of each unit, how its keys become components.
        attended: By the same, what attention makes of them.
        kept: By the same, [P, n], true where a component of the keys stays rotary.
        ranks: By the same, latent dims.
        constants: Whether the result can hold biases; else means are left in the latent.
        idle: Whether a layer without rotary pairs gets those of another, which are zero.
        norm: Of queries and keys.
    """

    sources: Sequence[int]
    mixtures: Mapping[int, Mixture]
    attended: Mapping[int, Attended]
    kept: Mapping[int, Tensor]
    ranks: Mapping[int, int]
    constants: bool
    idle: bool
    norm: QkNorm | None

    @property
    def shares(self) -> bool:
        """Whether any layer reads the latent of another."""
        return len(set(self.sources)) < len(self.sources)

    @property
    def planes(self) -> list[tuple[int, ...]]:
        """For each layer the RoPE plane of each pair of the rotary key."""
        own = {first: tuple(kept.nonzero()[:, 0].tolist()) for first, kept in self.kept.items()}
        idle = next(filter(None, own.values()), ()) if self.idle else ()
        return [own[source] or idle for source in self.sources]

    def convert(
        self,
        unit: Sequence[int],
        layers: Sequence[AttentionLayer],
        inputs: Inputs | None,
        *,
        shares: Sequence[float],
        scales: Sequence[float],
        factor: float,
    ) -> tuple[list[LatentLayer], list[dict[str, Any]]]:
        """The layers of a unit, without refits, and what each of them lost.

        Args:
            unit: Which layers; the first makes the latent.
            layers: The originals.
            inputs: Second moments of their inputs; None for equal, white ones.
            shares: How much the scores of each layer count beside those of the others.
            scales: Factor on the scores of each layer.
            factor: Of the rotation, where a scaled RoPE has one.

        Returns:
            Layers with the latent that they read, whoever makes it, and results.
        """
        first = unit[0]
        found = joint(layers, inputs, shares, self.norm, found=self.mixtures[first])
        attended, kept, rank = self.attended[first], self.kept[first], self.ranks[first]
        still = still_keys(found.rows, found.mixed, attended.turn, kept, factor**2)
        factors = factored_jointly(found, attended, still, rank, centred=self.constants)
        form = latent_form if self.norm is None else normed_form
        converted = [
            form(
                found.member(place),
                found.rows_of(place),
                found.mixed_for(place),
                kept=kept,
                factored=part,
                scale=scale,
            )
            for place, (part, scale) in enumerate(
                zip(parts_of(factors, len(unit)), scales, strict=True)
            )
        ]
        if not converted[0].planes and self.planes[first]:
            converted = [with_idle_pairs(layer, self.planes[first]) for layer in converted]
        lost = zip(
            lost_with_turn(attended, kept, len(unit)),
            lost_in_latent(found, attended, still, factors, centred=self.constants),
            unpredicted(found, attended, inputs),
            strict=True,
        )
        pairs = 2 * int(kept.sum())
        results = [
            {
                "rank": rank,
                "rope_dims": pairs,
                "lost_energy_rope": rope,
                "lost_energy_latent": latent,
            }
            | ({"lost_energy_shared": shared} if self.shares else {})
            for rope, latent, shared in lost
        ]
        return converted, results


def choose_latents(
    recipe: MlaRecipe,
    facts: ModelFacts,
    checkpoint: Checkpoint,
    *,
    splits: Sequence[Sizes],
    sources: Sequence[int],
    tokens: Tensor | None,
    progress: Callable[[int], None],
) -> tuple[list[Sizes], LatentChoice]:
    """Sizes of each layer, and what stays rotary there.

    Args:
        recipe: Settled.
        facts: The source.
        checkpoint: The open source.
        splits: Sizes between which to choose.
        sources: For each layer the one whose latent it reads.
        tokens: [N, T] calibration windows, or None.
        progress: Called with the number of parts just looked at, as by ``LayerProgress``.

    Raises:
        UsageError: If the model cannot have such sizes.
    """
    units = units_of(sources)
    found = survey(
        checkpoint,
        facts,
        sources=sources,
        tokens=tokens,
        device=recipe.device,
        pairs=_pairs_to_compare(recipe, facts, splits, len(units)),
        rank=most_dims(facts).rank if recipe.per_layer else max(own.rank for own in splits),
        selection=recipe.selection,
        progress=progress,
    )
    chosen = _chosen(recipe, facts, splits, [one.prospect for one in found])
    lost = [lost_without_turn(one.attended) for one in found]
    if recipe.per_layer:
        kept = [
            kept_components([own], pairs, recipe.selection, common=False)[0]
            for own, (pairs, _) in zip(lost, chosen, strict=True)
        ]
    else:
        native = recipe.target != "kvpatch" and deepseek_problem(facts, [0]) is None
        kept = kept_components(lost, chosen[0][0], recipe.selection, common=native)
    firsts = [unit[0] for unit in units]
    choice = LatentChoice(
        sources=sources,
        mixtures=dict(zip(firsts, (one.mixture for one in found), strict=True)),
        attended=dict(zip(firsts, (one.attended for one in found), strict=True)),
        kept=dict(zip(firsts, kept, strict=True)),
        ranks=dict(zip(firsts, (rank for _, rank in chosen), strict=True)),
        constants=not recipe.serving,
        idle=not recipe.per_layer,
        norm=facts.qk_norm,
    )
    sizes = [
        Sizes(choice.ranks[source], 2 * len(own))
        for source, own in zip(sources, choice.planes, strict=True)
    ]
    return sizes, choice


def _pairs_to_compare(
    recipe: MlaRecipe, facts: ModelFacts, splits: Sequence[Sizes], latents: int
) -> list[int]:
    """Numbers of rotary pairs for which losses are predicted; none if there is no choice."""
    equal = [split.rope_dims // 2 for split in splits]
    if not recipe.per_layer:
        return equal if len(equal) > 1 else []
    values = _numbers(recipe, facts, latents) // latents
    return sorted({*equal, *(round(part * values / 2) for part in _PARTS)})


def _chosen(
    recipe: MlaRecipe, facts: ModelFacts, splits: Sequence[Sizes], prospects: Sequence[Prospect]
) -> list[tuple[int, int]]:
    """Pairs and rank of each unit."""

    def lost(split: Sizes) -> float:
        return sum(one.lost(one.nearest(split.rope_dims // 2), split.rank) for one in prospects)

    best = splits[0] if len(splits) == 1 else min(splits, key=lost)
    if not recipe.per_layer:
        return [(best.rope_dims // 2, best.rank)] * len(prospects)
    start = [one.nearest(best.rope_dims // 2) for one in prospects]
    return distributed(prospects, _numbers(recipe, facts, len(prospects)), start=start)


def _numbers(recipe: MlaRecipe, facts: ModelFacts, latents: int) -> int:
    """What a budget leaves for all latents and rotary keys, beside the scales of keys."""
    assert recipe.kv_budget is not None
    share = parse_budget(recipe.kv_budget)
    assert isinstance(share, float)
    return budget_of(share, facts) - latents * facts.key_scales

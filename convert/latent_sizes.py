"""Sizes of latents: those that a recipe gives, or that its budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from convert.facts import ModelFacts
from convert.methods.cut import Selection
from convert.quantities import parse_budget
from convert.recipe import MlaRecipe
from convert.steps import units_of
from convert.targets.deepseek import deepseek_problem
from kvpatch.errors import UsageError

__all__ = ["Sizes", "budget_of", "constant_dims", "most_dims", "placeholder_planes", "sizes_of"]

# shares of a budget that its rotary dims may take
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Dims of the latent and of the rotary key of a layer."""

    rank: int
    rope_dims: int


def most_dims(facts: ModelFacts, selection: Selection = "greedy", layers: int = 1) -> Sizes:
    """Sizes at which nothing is lost, or that cannot be exceeded.

    Args:
        facts: The source.
        selection: What stays rotary; all but ``greedy`` take a plane once.
        layers: How many share one latent.
    """
    geometry = facts.geometry
    planes = max(rope.dim for rope in facts.ropes) // 2
    each = layers * geometry.kv_heads if selection == "greedy" else 1
    # constants of keys with a norm are in the latent, too
    return Sizes(geometry.hidden + (facts.qk_norm is not None), 2 * planes * each)


def sizes_of(recipe: MlaRecipe, facts: ModelFacts, sources: Sequence[int]) -> list[Sizes]:
    """The sizes that a recipe allows: one if it gives them, else the splits of its budget.

    Args:
        recipe: Settled.
        facts: The source.
        sources: For each layer the one whose latent it reads.

    Raises:
        UsageError: If the model cannot have them.
    """
    largest = max(len(unit) for unit in units_of(sources))
    most = most_dims(facts, recipe.selection, largest)
    if recipe.kv_budget is None:
        assert recipe.rank is not None
        assert recipe.rope_dims is not None
        possible = [Sizes(recipe.rank, recipe.rope_dims)]
    else:
        budget = parse_budget(recipe.kv_budget)
        possible = (
            [Sizes(*budget)]
            if isinstance(budget, tuple)
            else _splits(budget, recipe, facts, len(set(sources)))
        )
    if len(possible) == 1:
        _check(possible[0], most, recipe, facts)
    return possible


def budget_of(share: float, facts: ModelFacts) -> int:
    """Numbers per token that a share of the source's cache holds, in all layers together."""
    geometry = facts.geometry
    return int(share * facts.layers * geometry.kv_heads * (geometry.head_dim + geometry.value_dim))


def _splits(share: float, recipe: MlaRecipe, facts: ModelFacts, latents: int) -> list[Sizes]:
    """Sizes that together with what the class adds to them stay within a share of the cache.

    Args:
        share: Of the source's cache.
        recipe: Settled.
        facts: The source.
        latents: Layers that make one; what the others read counts once.
    """
    most, values = most_dims(facts, recipe.selection), budget_of(share, facts) // latents
    native = recipe.target != "kvpatch" and deepseek_problem(facts, [0]) is None
    free = values - constant_dims(recipe, native=native) - facts.key_scales
    found = []
    for part in _SHARES if most.rope_dims else (0.0,):
        rope = min(most.rope_dims, 2 * round(part * values / 2))
        rank = min(most.rank, free - rope)
        if rank > 0 and (rope or not most.rope_dims):
            found.append(Sizes(rank, rope))
    if not found:
        raise UsageError(
            f"--kv-budget {100 * share:g}% leaves {values} values per token and layer, too few",
            hint="Give a larger budget.",
        )
    return sorted(set(found), key=lambda sizes: sizes.rope_dims)


def placeholder_planes(
    recipe: MlaRecipe, facts: ModelFacts, sizes: Sequence[Sizes]
) -> list[list[int]]:
    """Planes for a plan from headers alone: those of ``stride``, else any."""
    planes = max(rope.dim for rope in facts.ropes) // 2
    counts = [own.rope_dims // 2 for own in sizes]
    stride = recipe.selection == "stride"
    steps = [max(1, planes // pairs) if stride and pairs else 1 for pairs in counts]
    return [
        [step * pair % planes for pair in range(pairs)]
        for step, pairs in zip(steps, counts, strict=True)
    ]


def constant_dims(recipe: MlaRecipe, *, native: bool) -> int:
    """Dims that are cached besides: the norm of the constant form needs one of its own."""
    return int(native and not recipe.serving)


def _check(sizes: Sizes, most: Sizes, recipe: MlaRecipe, facts: ModelFacts) -> None:
    rank, rope = (
        (f"--rank {sizes.rank}", f"--rope-dims {sizes.rope_dims}")
        if recipe.kv_budget is None
        else (f"--kv-budget: a rank of {sizes.rank}", f"--kv-budget: {sizes.rope_dims} rotary dims")
    )
    if sizes.rank > most.rank:
        constant = " and one constant" if facts.qk_norm is not None else ""
        raise UsageError(
            f"{rank} is more than this model's hidden width of {facts.geometry.hidden}{constant}",
            hint="A latent of that width would hold the whole input.",
        )
    if sizes.rope_dims <= most.rope_dims:
        return
    name, whole = facts.family.model_type, most_dims(facts).rope_dims
    if not whole:
        none = "--rope-dims 0" if recipe.kv_budget is None else f"--kv-budget {sizes.rank}+0"
        raise UsageError(
            f"{rope}: this {name} model has no rotary positions",
            hint=f"Give {none}: all of its keys go into the latent.",
        )
    one = recipe.selection != "greedy"
    raise UsageError(
        f"{rope} is more than the {most.rope_dims} dims that rotate in "
        f"{'one key' if one else 'all keys of a layer'} of this {name} model"
        + (f", of which --rope-select {recipe.selection} takes each once" if one else ""),
        hint=f"Give {most.rope_dims} or less"
        + (f", or up to {whole} with --rope-select greedy." if one else "."),
    )

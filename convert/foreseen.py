"""What a recipe will do as far as config.json tells, before any weight is read or downloaded.

It is what a dry run shows, and it is made first in every run, so that all refusals that need no
weights come at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from convert.choosing import possible_plan
from convert.facts import ModelFacts
from convert.latent_sizes import Sizes, most_dims, placeholder_planes, sizes_of
from convert.recipe import ClaRecipe, ExportRecipe, MlaRecipe, Recipe
from convert.scheme import Merging, Scheme, latent_scheme, scheme_of
from convert.serving_sizes import servable
from convert.sharing import parse_layers, uniform_plan
from convert.steps import units_of

__all__ = ["foreseen"]


def foreseen(recipe: Recipe, facts: ModelFacts, *, largest: bool) -> Scheme:
    """The scheme of a settled recipe, before what is open is chosen by what it loses.

    Of layers that are to be chosen it has the most even groups; of the splits of a budget one whose
    cache and weights are the largest, or the smallest.

    Args:
        recipe: From ``settled``.
        facts: The source.
        largest: Take the split with most rotary dims: no other needs more. Else that with fewest:
            where it does not fit, none does.

    Raises:
        UsageError: If the model does not allow what the recipe asks for.
    """
    assert not isinstance(recipe, ExportRecipe), "an export has a scheme of its own"
    sources = _sources(recipe, facts)
    if not isinstance(recipe, MlaRecipe):
        return scheme_of(recipe, facts, sources)
    splits = servable(recipe, facts, sizes_of(recipe, facts, sources))
    shown = splits[-1 if largest else 0]
    rank, rope = shown.rank, shown.rope_dims
    sizes = [Sizes(rank, rope)] * len(sources)
    for unit in units_of(sources):  # a single layer may have fewer components than one that shares
        most = most_dims(facts, recipe.selection, len(unit)).rope_dims
        for layer in unit:
            sizes[layer] = Sizes(rank, min(rope, most))
    planes = placeholder_planes(recipe, facts, sizes)
    scheme = latent_scheme(recipe, facts, sizes, planes, sources)
    return dataclasses.replace(scheme, splits=tuple(splits))


def _sources(recipe: Merging | MlaRecipe, facts: ModelFacts) -> Sequence[int]:
    """For each layer the one whose keys and values it reads afterwards, or could read."""
    if not isinstance(recipe, ClaRecipe | MlaRecipe) or recipe.share is None:
        return range(facts.layers)
    assert recipe.layers is not None
    if recipe.layers == "auto":
        return possible_plan(facts, recipe.share)
    auto = isinstance(recipe, ClaRecipe)  # which knows it
    span = parse_layers(recipe.layers, facts.layers, auto=auto)
    return uniform_plan(facts, recipe.share, *span, auto=auto)

"""Latents for servers: which sizes they hold, and refusals whose hints are commands that work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convert.facts import ModelFacts
from convert.invocation import command_of
from convert.latent_sizes import Sizes, most_dims, placeholder_planes, sizes_of
from convert.latents import native_class
from convert.quantities import parse_budget
from convert.recipe import MlaRecipe
from convert.targets.deepseek import deepseek_problem
from convert.targets.dense_blocks import BLOCKS, stock_config
from convert.targets.serving import serving_problems
from kvpatch.errors import UsageError

__all__ = ["refuse_serving", "servable"]

_USUAL = 64  # rotary dims of DeepSeek's own models
_NAMED = 2  # sizes in a hint


def servable(recipe: MlaRecipe, facts: ModelFacts, splits: Sequence[Sizes]) -> list[Sizes]:
    """Those of possible sizes with which servers load the result; all if they need not.

    Args:
        recipe: What is asked for.
        facts: The source.
        splits: Sizes that the recipe allows.
    """
    if not recipe.serving:
        return list(splits)
    return [split for split in splits if not _problems(recipe, facts, split)]


def refuse_serving(recipe: MlaRecipe, facts: ModelFacts) -> None:
    """Refuse a recipe for servers that they would not load.

    Args:
        recipe: As it is asked for; its hints are commands, without what would be chosen anyway.
        facts: The source, of a model that latents can hold.

    Raises:
        UsageError: With a command that works as the hint.
    """
    if not recipe.serving:
        return
    problem, model_type = deepseek_problem(facts, [0]), facts.family.model_type
    if problem is not None:
        raise UsageError(
            f"--serving: no latent attention of transformers holds this {model_type} model: "
            f"{problem}",
            hint=_without(recipe, facts, target=None, arch="deepseek_v3"),
        )
    if recipe.selection != "stride":  # what others choose depends on the weights
        raise UsageError(
            f"--serving: --rope-select {recipe.selection} chooses rotary frequencies that are on "
            "no common base, and servers know no others",
            hint=_way_out(recipe, facts),
        )
    if BLOCKS[model_type].query_bias(stock_config(facts)):
        raise UsageError(
            f"--serving: the attention of this {model_type} model has biases, which "
            "servers of DeepSeek models ignore",
            hint=_without(recipe, facts),
        )
    try:
        splits = sizes_of(recipe, facts, range(facts.layers))
    except UsageError as error:  # what fits the model must fit servers, too
        raise UsageError(error.message, hint=_way_out(recipe, facts)) from error
    if not servable(recipe, facts, splits):
        split = f", however --kv-budget {recipe.kv_budget} is split" if len(splits) > 1 else ""
        problems = "; ".join(_problems(recipe, facts, splits[-1]))
        raise UsageError(
            f"--serving: servers would not load the result as it should be{split}: {problems}",
            hint=_way_out(recipe, facts),
        )


def _problems(recipe: MlaRecipe, facts: ModelFacts, sizes: Sizes) -> list[str]:
    (planes,) = placeholder_planes(recipe, facts, [sizes])
    problem = deepseek_problem(facts, planes)
    if problem is not None:
        return [problem]
    return serving_problems(native_class(recipe, facts, sizes.rank, planes).edit(facts.config))


def _way_out(recipe: MlaRecipe, facts: ModelFacts) -> str:
    """What to do instead, with a command at the end."""
    plain = recipe.model_copy(update={"rope_select": None})
    if _goes(plain, facts):
        return f"Leave --rope-select out: {command_of(plain)}"
    held = _held(plain, facts)
    if not held:
        return _without(recipe, facts)
    sizes = [f"{own.rank}+{own.rope_dims}" for own in held]
    given = {"kv_budget": sizes[0], "rank": None, "rope_dims": None}
    return (
        f"Servers take this model with latents of {' or '.join(sizes)}: "
        f"{command_of(plain.model_copy(update=given))}"
    )


def _without(recipe: MlaRecipe, facts: ModelFacts, **given: str | None) -> str:
    """The advice to do without servers; a refusal where sizes do not fit the model either."""
    plain = recipe.model_copy(update={"serving": False, **given})
    sizes_of(plain, facts, range(facts.layers))
    return f"Leave --serving out: {command_of(plain)}"


def _goes(recipe: MlaRecipe, facts: ModelFacts) -> bool:
    try:
        return bool(servable(recipe, facts, sizes_of(recipe, facts, range(facts.layers))))
    except UsageError:
        return False


def _held(recipe: MlaRecipe, facts: ModelFacts) -> list[Sizes]:
    """Sizes that servers hold and that make the cache smaller, nearest first to what is asked for.

    Of several with as many numbers the one with the most usual rotary key.
    """
    usual: dict[int, Sizes] = {}
    for own in _tried(recipe, facts):
        total = own.rank + own.rope_dims
        best = usual.setdefault(total, own)
        if abs(own.rope_dims - _USUAL) < abs(best.rope_dims - _USUAL):
            usual[total] = own
    wanted = _asked(recipe, facts)
    return [usual[total] for total in sorted(usual, key=lambda n: abs(n - wanted))[:_NAMED]]


def _tried(recipe: MlaRecipe, facts: ModelFacts) -> Iterator[Sizes]:
    """Sizes that servers hold: with rotary keys of planes at equal distances, and every rank."""
    most, before = most_dims(facts, "stride"), _numbers(facts)
    planes = most.rope_dims // 2
    for pairs in (n for n in range(1, planes + 1) if not planes % n):
        (chosen,) = placeholder_planes(recipe, facts, [Sizes(1, 2 * pairs)])
        config = native_class(recipe, facts, 1, chosen).edit(facts.config)
        for rank in range(1, min(most.rank + 1, before - 2 * pairs)):
            if not serving_problems({**config, "kv_lora_rank": rank}):
                yield Sizes(rank, 2 * pairs)


def _numbers(facts: ModelFacts) -> int:
    """What a layer of the source caches of a token."""
    return facts.geometry.kv_heads * (facts.geometry.head_dim + facts.geometry.value_dim)


def _asked(recipe: MlaRecipe, facts: ModelFacts) -> float:
    """Numbers of a token and layer that a recipe asks for."""
    if recipe.kv_budget is None:
        return (recipe.rank or 0) + (recipe.rope_dims or 0)
    budget = parse_budget(recipe.kv_budget)
    return sum(budget) if isinstance(budget, tuple) else budget * _numbers(facts)

"""From a recipe and its source to what will be done: open choices made, misfits refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert.facts import ModelFacts
from convert.latent_sizes import Sizes
from convert.latents import Planes, frozen_table, latent_method, latent_target, refuse_latents
from convert.methods import Method
from convert.methods.pool import pooling
from convert.methods.svd import svd_merge
from convert.recipe import ClaRecipe, ExportRecipe, GqaRecipe, MlaRecipe, MqaRecipe, Recipe
from convert.serving_sizes import refuse_serving
from convert.targets import Target, targets_for
from kvpatch.errors import UsageError
from kvpatch.memory import KVCache
from kvpatch.models import PREFIX

__all__ = ["Merging", "Scheme", "latent_scheme", "method_of", "scheme_of", "settled"]

Merging = GqaRecipe | MqaRecipe | ClaRecipe

# keys that say where and how to run, not what the result is
_RUN_KEYS = frozenset(
    {"source", "output", "revision", "max_ram", "overwrite", "resume", "device", "calibration"}
)
# canonical fields that the refits need beside those that a method reads
_REFIT_READS = frozenset({"q", "k", "v", "o", "q_norm", "k_norm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What a conversion does.

    Args:
        recipe: With every choice made that the result depends on.
        method: The conversion of a unit of layers.
        target: What the result is written as.
        kv_heads: KV heads of each layer afterwards; None where it has a latent.
        sources: For each layer the one whose keys and values it reads afterwards.
        sizes: Of the latent of each layer; None if there are none.
        scales: Factors of keys that are cached beside each latent.
        cache: KV cache of the result.
        before: KV cache of the source; None where it is that of its KV heads.
        warnings: What the user should know.
        caveats: What everybody who runs the result should know; the card says it, too.
        splits: Before the sizes of latents are chosen, those between which to choose; a single one
            where they are given.
    """

    recipe: Recipe
    method: Method
    target: Target
    kv_heads: int | None
    sources: tuple[int, ...]
    sizes: tuple[Sizes, ...] | None = None
    scales: int = 0
    cache: KVCache
    before: KVCache | None = None
    warnings: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    splits: tuple[Sizes, ...] = ()

    @property
    def result_keys(self) -> dict[str, Any]:
        """The part of the recipe that determines the result; equal results have equal manifests."""
        unused = set(_RUN_KEYS)
        if isinstance(self.recipe, MlaRecipe) and self.recipe.rank is not None:
            unused.add("kv_budget")  # the sizes are there
        if self.recipe.calibration is None:
            unused |= {"samples", "context", "seed"}
        return {
            key: value
            for key, value in self.recipe.model_dump().items()
            if key not in unused and value is not None
        }

    @property
    def latent(self) -> dict[str, int | list[int]] | None:
        """Sizes of the latents, ``rank`` and ``rope_dims``: of every layer, or a list of them.

        With ``key_scales``, the number of factors of keys beside each, if there are any.
        """
        if self.sizes is None:
            return None
        one = self.sizes[0] if len(set(self.sizes)) == 1 else None
        sizes: dict[str, int | list[int]] = {
            key: getattr(one, key) if one else [getattr(own, key) for own in self.sizes]
            for key in ("rank", "rope_dims")
        }
        return sizes | ({"key_scales": self.scales} if self.scales else {})


def settled(recipe: Recipe, facts: ModelFacts) -> Recipe:
    """The recipe with the choices made that it leaves open.

    Raises:
        UsageError: If the model does not allow what the recipe asks for.
    """
    if isinstance(recipe, ExportRecipe):
        return recipe  # it leaves nothing open
    if facts.family.model_type.startswith(PREFIX):
        raise UsageError(
            f"this {facts.family.model_type} model is a conversion already",
            hint="Convert the model that it was made from.",
        )
    choices = (
        _latent_choices(recipe, facts)
        if isinstance(recipe, MlaRecipe)
        else (_merging_choices(recipe, facts))
    )
    if recipe.calibration is not None:
        context = recipe.context or min(512, facts.context)
        if context > facts.context:
            raise UsageError(
                f"--context {context} is longer than this model's {facts.context} tokens",
                hint=f"Give {facts.context} or less.",
            )
        choices["context"] = context
    known = {key: value for key, value in choices.items() if key in type(recipe).model_fields}
    return recipe.model_copy(update=known)


def _latent_choices(recipe: MlaRecipe, facts: ModelFacts) -> dict[str, Any]:
    refuse_latents(facts)
    refuse_serving(recipe, facts)
    if facts.qk_norm is not None and recipe.share is not None:
        raise UsageError(
            f"--share {recipe.share} does not work here: this {facts.family.model_type} model "
            "norms its keys, which gives those of each layer a factor of their own, and what is "
            "shared holds the factors of one layer",
            hint="Leave --share out, or share keys and values: kvpatch cla.",
        )
    return {
        "refit": recipe.refit or ("none" if recipe.calibration is None else "qo"),
        "rope_select": recipe.selection,
        "target": recipe.target if recipe.uneven is None else "kvpatch",
        "layers": recipe.layers if recipe.share is None else recipe.layers or ":",
    }


def _merging_choices(recipe: Merging, facts: ModelFacts) -> dict[str, Any]:
    now, wanted = facts.geometry.kv_heads, recipe.kv_heads or facts.geometry.kv_heads
    shares = isinstance(recipe, ClaRecipe)
    _check_kv_heads(facts, wanted, also_now=shares)
    normed = facts.qk_norm is not None
    calibrated = recipe.calibration is not None and recipe.merge == "svd"
    if recipe.merge == "svd" and facts.clip is not None:
        raise UsageError(
            f"--merge svd would change what clip_qkv {facts.clip} cuts off in this model",
            hint="Choose --merge mean or first.",
        )
    refit = recipe.refit or (("o" if normed else "qo") if calibrated else "none")
    _check_query_refit(refit, facts)
    alibi = facts.family.positions == "alibi"
    if recipe.calibration is not None and alibi:
        raise UsageError(
            f"--calibration does not work for {facts.family.model_type}, whose scores have ALiBi "
            "offsets",
            hint="Convert without it: --merge svd works from the weights alone.",
        )
    choices: dict[str, Any] = {"refit": refit, "kv_heads": wanted}
    if isinstance(recipe, GqaRecipe):
        if recipe.group == "similar" and normed:
            raise UsageError(
                "--group similar does not work here: this model's queries and keys have a norm, "
                "and its keys can only be averaged with their neighbours",
                hint="Choose --group adjacent.",
            )
        if recipe.group == "similar" and alibi:
            raise UsageError(
                f"--group similar does not work for {facts.family.model_type}, whose query heads "
                "cannot change places: each has an ALiBi slope of its own",
                hint="Choose --group adjacent.",
            )
        similar = calibrated and not normed and 1 < wanted < now
        choices["group"] = recipe.group or ("similar" if similar else "adjacent")
    elif alibi or normed:  # query heads that stay in their places, or keys that are not matched
        choices["match"] = False
    return choices


def _check_query_refit(refit: str, facts: ModelFacts) -> None:
    normed = facts.qk_norm is not None
    if "q" not in refit or not (normed or facts.clip is not None):
        return
    stands = "a norm" if normed else f"the clamp clip_qkv {facts.clip}"
    raise UsageError(
        f"--refit {refit} does not work here: {stands} stands between the projections of this "
        "model and their scores, which are then not linear in them",
        hint="Choose --refit o.",
    )


def scheme_of(recipe: Merging, facts: ModelFacts, sources: Sequence[int]) -> Scheme:
    """What a settled recipe does to a model.

    Args:
        recipe: From ``settled``.
        facts: The source.
        sources: For each layer the one whose keys and values it reads afterwards.

    Raises:
        UsageError: If no class holds the result.
    """
    kv_heads = recipe.kv_heads
    assert kv_heads is not None
    possible = {
        target.name: target
        for target in reversed(
            targets_for(facts, kv_heads=kv_heads, kv_source_layers=list(sources))
        )
    }
    best = "native" if "native" in possible else "kvpatch"
    name = recipe.target or best
    if name not in possible:
        raise UsageError(
            f"--target {name}: there is no such class for a {facts.family.model_type} model with "
            f"{kv_heads} KV heads",
            hint=f"Choose --target {best}.",
        )
    target = possible[name]
    settled_recipe = recipe
    if "target" in type(recipe).model_fields:
        settled_recipe = recipe.model_copy(update={"target": name})
    return Scheme(
        recipe=settled_recipe,
        method=method_of(recipe),
        target=target,
        kv_heads=kv_heads,
        sources=tuple(sources),
        cache=facts.cache(kv_heads=kv_heads, sources=sources, dtype=recipe.dtype),
        warnings=tuple(_warnings(recipe, facts, target)),
    )


def latent_scheme(
    recipe: MlaRecipe,
    facts: ModelFacts,
    sizes: Sequence[Sizes],
    planes: Planes,
    sources: Sequence[int],
) -> Scheme:
    """What a settled recipe for latents does to a model.

    Args:
        recipe: From ``settled``.
        facts: The source.
        sizes: Of the latent and the rotary key of each layer.
        planes: For each layer the RoPE plane of each pair of the rotary key.
        sources: For each layer the one whose latent it reads.

    Raises:
        UsageError: If no class holds the result.
    """
    target, cache = latent_target(recipe, facts, sizes, planes, sources)
    chosen: dict[str, Any] = {"target": target.name}
    if not recipe.per_layer:  # a shared latent may hold more rotary dims than one of a single layer
        largest = max(sizes, key=lambda own: own.rope_dims)
        chosen |= {"rank": largest.rank, "rope_dims": largest.rope_dims}
    return Scheme(
        recipe=recipe.model_copy(update=chosen),
        method=latent_method(sizes, facts, planes, sources, constants=not recipe.serving),
        target=target,
        kv_heads=None,
        sources=tuple(sources),
        sizes=tuple(sizes),
        scales=facts.key_scales,
        cache=cache,
        warnings=tuple(_latent_warnings(recipe, facts, target, cache)),
        caveats=tuple(frozen_table(facts, sizes, sources)),
    )


def method_of(recipe: Merging) -> Method:
    """The conversion of a unit of layers that a settled recipe asks for."""
    assert recipe.kv_heads is not None
    if recipe.merge == "svd":
        return svd_merge(kv_heads=recipe.kv_heads, grouping=recipe.group or "adjacent")
    method = pooling(kv_heads=recipe.kv_heads, merge=recipe.merge)
    if recipe.refit == "none":
        return method
    return dataclasses.replace(method, reads=method.reads | _REFIT_READS)


def _warnings(recipe: Merging, facts: ModelFacts, target: Target) -> list[str]:
    warnings = []
    if recipe.kv_heads == 1 and recipe.merge != "svd":
        warnings.append(
            "MQA by pooling loses the most; expect to uptrain (arXiv:2305.13245, appendix A)"
        )
    if recipe.merge == "svd" and facts.qk_norm is not None:
        warnings.append("queries and keys have a norm: keys are averaged, only values merged")
    return warnings + _class_warnings(facts, target)


def _latent_warnings(
    recipe: MlaRecipe, facts: ModelFacts, target: Target, cache: KVCache
) -> list[str]:
    asked = recipe.target == target.name == "kvpatch" and recipe.uneven is None
    warnings = [] if asked else _class_warnings(facts, target)
    if facts.qk_norm is not None:
        warnings.append(
            f"queries and keys have a norm: its scales are cached too ({facts.key_scales} per "
            "token and layer), and queries and keys are not refitted"
        )
    before = facts.cache(dtype=recipe.dtype).bytes_per_token
    if cache.bytes_per_token >= before:
        warnings.append(
            f"the cache gets no smaller: {cache.bytes_per_token:,} bytes per token, before "
            f"{before:,}"
        )
    return warnings


def _class_warnings(facts: ModelFacts, target: Target) -> list[str]:
    warnings = []
    if "auto_map" in facts.config and target.name == "native":
        warnings.append("auto_map is left out of config.json: the result needs no remote code")
    if target.name == "kvpatch":
        warnings.append(
            f"no class of transformers holds this: {target.architecture} loads it, by import "
            "kvpatch or with trust_remote_code=True"
        )
    elif target.model_type != facts.family.model_type:
        warnings.append(f"the result is a {target.model_type} model")
    return warnings


def _check_kv_heads(facts: ModelFacts, wanted: int, *, also_now: bool) -> None:
    now, name = facts.geometry.kv_heads, facts.family.model_type
    legal = [*facts.legal_kv_heads(), *([now] if also_now else [])]
    if wanted in legal:
        return
    if not legal:
        raise UsageError(f"this {name} model has a single KV head (MQA) already")
    raise UsageError(
        f"--kv-heads {wanted} does not work for a {name} model with {now} KV heads per layer",
        hint=f"Choose one of {', '.join(map(str, legal))}: smaller than {now} and dividing it.",
    )

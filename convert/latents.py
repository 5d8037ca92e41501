"""The scheme of a conversion to latents (MLA): sizes, class, and what is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.latent_sizes import Sizes, constant_dims, most_dims
from convert.layer import AttentionLayer, LatentLayer
from convert.methods import Method, Outline
from convert.methods.joint import reader
from convert.recipe import MlaRecipe
from convert.steps import units_of
from convert.targets import Target
from convert.targets.deepseek import deepseek_class, deepseek_problem
from convert.targets.dense_blocks import stock_config
from convert.targets.latent import latent_class
from convert.targets.rope_tables import switching_length
from kvpatch.errors import UsageError
from kvpatch.memory import KVCache, latent_cache
from kvpatch.models import FAMILIES

__all__ = [
    "Planes",
    "frozen_table",
    "latent_architecture",
    "latent_method",
    "latent_target",
    "native_class",
    "refuse_latents",
]

Planes = Sequence[Sequence[int]]
_DEFAULT_ARCH = "deepseek_v3"


def refuse_latents(facts: ModelFacts) -> None:
    """Refuse what latents cannot hold.

    Raises:
        UsageError: Naming what stands in the way.
    """
    problem = _latent_problem(facts)
    if problem is not None:
        raise UsageError(
            f"this {facts.family.model_type} model cannot be converted to latents: {problem}",
            hint="Merge its KV heads instead: kvpatch gqa or kvpatch cla.",
        )
    if latent_architecture(facts) is None:
        raise UsageError(
            f"no class with latent attention holds a {facts.family.model_type} model",
            hint="Merge its KV heads instead: kvpatch gqa.",
        )


def _latent_problem(facts: ModelFacts) -> str | None:
    reasons = {
        "the norm of its keys adds a bias, which would turn with the positions of a shared key": (
            facts.qk_norm is not None and not facts.key_scales and _is_ours(facts)
        ),
        f"clip_qkv {facts.clip} cuts off what latents would reproduce": facts.clip is not None,
        f"its scores have a softcap of {facts.softcap}, under which constants of keys count": (
            facts.softcap is not None
        ),
        "its scores have ALiBi offsets": facts.family.positions == "alibi",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_ours(facts: ModelFacts) -> bool:
    return facts.family.model_type in FAMILIES


def latent_architecture(facts: ModelFacts) -> str | None:
    """The class that latents of a model are written for by default; None if there is none."""
    if _latent_problem(facts) is not None:
        return None
    planes = [0] if any(rope.dim for rope in facts.ropes) else []
    if deepseek_problem(facts, planes) is None:
        return "DeepseekV3ForCausalLM"
    sizes = [Sizes(1, 2 * len(planes))] * facts.layers
    ours = _our_class(facts, sizes, [planes] * facts.layers, range(facts.layers))
    return None if ours is None else ours.architecture


def latent_method(
    sizes: Sequence[Sizes],
    facts: ModelFacts,
    planes: Planes,
    sources: Sequence[int],
    *,
    constants: bool,
) -> Method:
    """The conversion of layers as plan and engine see it; a ``Converting`` carries it out.

    Args:
        sizes: Of each layer.
        facts: The source.
        planes: For each layer the RoPE plane of each pair of the rotary key.
        sources: For each layer the one whose latent it reads.
        constants: Whether the result can hold biases.
    """
    normed = facts.qk_norm is not None
    alike: dict[tuple[Sizes, tuple[int, ...]], Outline] = {}
    outlines: dict[int, Outline] = {}
    for first in dict.fromkeys(sources):
        key = sizes[first], tuple(planes[first])
        outlines[first] = alike.setdefault(
            key,
            partial(
                _outline,
                sizes=key[0],
                planes=key[1],
                scale=facts.scales[0],
                constants=constants,
                normed=normed,
            ),
        )
    together = max(len(unit) for unit in units_of(sources))
    return Method(
        reads=frozenset({"q", "k", "v", "o"} | ({"q_norm", "k_norm"} if normed else set())),
        outline=outlines[0],
        outlines=outlines,
        convert=None,
        # rows and components in float64 and complex128, and squares of the hidden width
        working_bytes=lambda largest: 96 * together * largest,
    )


def _outline(layers: Sequence[AttentionLayer], **options: Any) -> list[LatentLayer]:
    each = [_outlined(layer, **options) for layer in layers]
    return [each[0], *(reader(layer) for layer in each[1:])]


def _outlined(
    layer: AttentionLayer,
    *,
    sizes: Sizes,
    planes: tuple[int, ...],
    scale: float,
    constants: bool,
    normed: bool,
) -> LatentLayer:
    g = layer.geometry
    like = layer.q
    assert like is not None

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((), dtype=like.dtype).expand(shape)

    rank, rope = sizes.rank, sizes.rope_dims
    width = g.head_dim + (0 if normed else rope)
    return LatentLayer(
        geometry=g.latent(rank, rope),
        q=zeros(g.heads, width, g.hidden),
        latent=zeros(rank, g.hidden),
        k_rope=zeros(rope, g.hidden),
        k_up=zeros(g.heads, g.head_dim, rank),
        v_up=zeros(g.heads, g.value_dim, rank),
        o=zeros(g.hidden, g.heads, g.value_dim),
        q_bias=None if layer.q_bias is None else zeros(g.heads, width),
        k_rope_bias=None if layer.k_bias is None else zeros(rope),
        o_bias=zeros(g.hidden) if constants else None,
        q_rope=zeros(g.heads, rope, g.head_dim) if normed else None,
        k=layer.k if normed else None,
        q_norm=layer.q_norm,
        q_norm_bias=layer.q_norm_bias,
        planes=planes,
        scale=scale,
    )


def latent_target(
    recipe: MlaRecipe,
    facts: ModelFacts,
    sizes: Sequence[Sizes],
    planes: Planes,
    sources: Sequence[int],
) -> tuple[Target, KVCache]:
    """The class that holds the result, and its cache.

    Args:
        recipe: What is asked for; without a target, the class of transformers if it can hold it.
        facts: The source.
        sizes: Of each layer; equal ones unless the target is kvpatch.
        planes: For each layer the RoPE plane of each pair of the rotary key.
        sources: For each layer the one whose latent it reads; its own unless the target is kvpatch.

    Raises:
        UsageError: If no class does, or not the one asked for.
    """
    name = facts.family.model_type
    if recipe.target == "kvpatch" and recipe.arch != _DEFAULT_ARCH:
        raise UsageError(
            f"--arch {recipe.arch} is for native results",
            hint="Leave --target kvpatch out.",
        )
    common = next((list(p) for p in planes if p), [])
    problem = deepseek_problem(facts, common)
    if any(list(p) != common for p in planes):
        problem = problem or "its layers keep components of different frequencies"
    if recipe.target != "kvpatch" and problem is None:
        native = native_class(recipe, facts, sizes[0].rank, common)
        more = constant_dims(recipe, native=True)
        cached = [Sizes(own.rank + more, own.rope_dims) for own in sizes]
        return native, _cache(recipe, facts, cached, sources)
    asked = {
        "--target native": recipe.target == "native",
        f"--arch {recipe.arch}": recipe.arch != _DEFAULT_ARCH,
    }
    if any(asked.values()):
        asked_for = next(flag for flag, given in asked.items() if given)
        raise UsageError(
            f"{asked_for}: no latent attention of transformers holds this {name} model: {problem}",
            hint=f"Leave {asked_for} out: a class of kvpatch holds it.",
        )
    ours = _our_class(facts, sizes, planes, sources)
    assert ours is not None
    return ours, _cache(recipe, facts, sizes, sources)


def frozen_table(facts: ModelFacts, sizes: Sequence[Sizes], sources: Sequence[int]) -> list[str]:
    """A caveat if what loses its rotation would need another constant at other lengths.

    Args:
        facts: The source.
        sizes: Of each layer.
        sources: For each layer the one whose latent it reads.
    """
    turning = any(
        sizes[unit[0]].rope_dims < most_dims(facts, layers=len(unit)).rope_dims
        for unit in units_of(sources)
    )
    kinds = {rope.kind for rope in facts.ropes if rope.dim} - {"default"}
    length = switching_length(facts, stock_config(facts)) if turning and kinds else None
    if length is None:
        return []
    caveat = (
        f"beyond {length:,} tokens this model has other rotary frequencies: the rotary key has "
        "them, too, but in keys that no longer rotate one table is kept for all lengths"
    )
    return [caveat]


def native_class(recipe: MlaRecipe, facts: ModelFacts, rank: int, planes: Sequence[int]) -> Target:
    """The class of transformers that holds a result, of a model without a ``deepseek_problem``.

    Raises:
        UsageError: If the dtype cannot hold what makes the norm of its latents inert.
    """
    target = deepseek_class(
        facts,
        rank=rank,
        planes=planes,
        nope_dim=facts.geometry.head_dim,
        arch=recipe.arch,
        inert="epsilon" if recipe.serving else "constant",
        dtype=recipe.dtype,
        largest=None,
    )
    assert target is not None
    return target


def _our_class(
    facts: ModelFacts, sizes: Sequence[Sizes], planes: Planes, sources: Sequence[int]
) -> Target | None:
    return latent_class(
        facts,
        ranks=[own.rank for own in sizes],
        planes=planes,
        nope_dim=facts.geometry.head_dim,
        value_dim=facts.geometry.value_dim,
        kv_source_layers=sources if len(set(sources)) < facts.layers else None,
    )


def _cache(
    recipe: MlaRecipe, facts: ModelFacts, sizes: Sequence[Sizes], sources: Sequence[int]
) -> KVCache:
    return latent_cache(
        layers=facts.layers,
        rank=[own.rank for own in sizes],
        rope_dim=[own.rope_dims for own in sizes],
        scales=facts.key_scales,
        sources=sources,
        windows=facts.windows if facts.family.windows.cached else None,
        bytes_per_value=facts.bytes_per_value(recipe.dtype),
    )

"""The scheme of a conversion to latents (MLA): sizes, class, and what is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.layer import AttentionLayer, LatentGeometry, LatentLayer
from convert.methods import Method
from convert.methods.cut import Selection
from convert.recipe import MlaRecipe, parse_budget
from convert.targets import Target
from convert.targets.deepseek import deepseek_class, deepseek_problem
from convert.targets.dense_blocks import BLOCKS, stock_config
from convert.targets.latent import latent_class
from convert.targets.serving import serving_problems
from kvpatch.errors import UsageError
from kvpatch.memory import KVCache, latent_cache
from kvpatch.models import FAMILIES

__all__ = [
    "Planes",
    "Sizes",
    "latent_architecture",
    "latent_method",
    "latent_target",
    "most_dims",
    "placeholder_planes",
    "refuse_latents",
    "sizes_of",
]

Planes = Sequence[Sequence[int]]
# shares of a budget that its rotary dims may take
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)
_DEFAULT_ARCH = "deepseek_v3"


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Dims of the latent and of the rotary key, in every layer."""

    rank: int
    rope_dims: int


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
    ours = _our_class(facts, Sizes(1, 2 * len(planes)), [planes] * facts.layers)
    return None if ours is None else ours.architecture


def most_dims(facts: ModelFacts, selection: Selection = "greedy") -> Sizes:
    """Sizes at which nothing is lost, or that cannot be exceeded.

    Args:
        facts: The source.
        selection: What stays rotary; all but ``greedy`` take a plane once.
    """
    geometry = facts.geometry
    planes = max(rope.dim for rope in facts.ropes) // 2
    each = geometry.kv_heads if selection == "greedy" else 1
    # constants of keys with a norm are in the latent, too
    return Sizes(geometry.hidden + (facts.qk_norm is not None), 2 * planes * each)


def sizes_of(recipe: MlaRecipe, facts: ModelFacts) -> list[Sizes]:
    """The sizes that a recipe allows: one if it gives them, else the splits of its budget.

    Raises:
        UsageError: If the model cannot have them.
    """
    most = most_dims(facts, recipe.rope_select)
    if recipe.kv_budget is None:
        assert recipe.rank is not None
        assert recipe.rope_dims is not None
        possible = [Sizes(recipe.rank, recipe.rope_dims)]
    else:
        budget = parse_budget(recipe.kv_budget)
        possible = [Sizes(*budget)] if isinstance(budget, tuple) else _splits(budget, recipe, facts)
    if len(possible) == 1:
        _check(possible[0], most, recipe, facts)
    return possible


def _splits(share: float, recipe: MlaRecipe, facts: ModelFacts) -> list[Sizes]:
    """Sizes that together with what the class adds to them stay within a share of the cache."""
    geometry, most = facts.geometry, most_dims(facts, recipe.rope_select)
    values = int(share * geometry.kv_heads * (geometry.head_dim + geometry.value_dim))
    native = recipe.target != "kvpatch" and deepseek_problem(facts, [0]) is None
    free = values - _constant_dims(recipe, native=native) - facts.key_scales
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


def _constant_dims(recipe: MlaRecipe, *, native: bool) -> int:
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
        raise UsageError(
            f"{rope}: this {name} model has no rotary positions",
            hint="Give --rope-dims 0: all of its keys go into the latent.",
        )
    one = recipe.rope_select != "greedy"
    raise UsageError(
        f"{rope} is more than the {most.rope_dims} dims that rotate in "
        f"{'one key' if one else 'all keys of a layer'} of this {name} model"
        + (f", of which --rope-select {recipe.rope_select} takes each once" if one else ""),
        hint=f"Give {most.rope_dims} or less"
        + (f", or up to {whole} with --rope-select greedy." if one else "."),
    )


def placeholder_planes(recipe: MlaRecipe, facts: ModelFacts, sizes: Sizes) -> list[list[int]]:
    """Planes for a plan from headers alone: those of ``stride``, else any."""
    pairs = sizes.rope_dims // 2
    planes = max(rope.dim for rope in facts.ropes) // 2
    step = max(1, planes // pairs) if recipe.rope_select == "stride" and pairs else 1
    return [[step * pair % planes for pair in range(pairs)]] * facts.layers


def latent_method(
    sizes: Sizes, facts: ModelFacts, planes: Sequence[int], *, constants: bool
) -> Method:
    """The conversion of a layer as plan and engine see it; a ``Converting`` carries it out."""
    normed = facts.qk_norm is not None
    return Method(
        reads=frozenset({"q", "k", "v", "o"} | ({"q_norm", "k_norm"} if normed else set())),
        outline=partial(
            _outline,
            sizes=sizes,
            planes=tuple(planes),
            scale=facts.scales[0],
            constants=constants,
            normed=normed,
        ),
        convert=None,
        # rows and components in float64 and complex128, and squares of the hidden width
        working_bytes=lambda largest: 96 * largest,
    )


def _outline(
    layers: Sequence[AttentionLayer],
    *,
    sizes: Sizes,
    planes: tuple[int, ...],
    scale: float,
    constants: bool,
    normed: bool,
) -> list[LatentLayer]:
    (layer,) = layers
    g = layer.geometry
    like = layer.q
    assert like is not None

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((), dtype=like.dtype).expand(shape)

    rank, rope = sizes.rank, sizes.rope_dims
    width = g.head_dim + (0 if normed else rope)
    return [
        LatentLayer(
            geometry=LatentGeometry(
                hidden=g.hidden,
                heads=g.heads,
                rank=rank,
                nope_dim=g.head_dim,
                rope_dim=rope,
                value_dim=g.value_dim,
            ),
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
    ]


def latent_target(
    recipe: MlaRecipe, facts: ModelFacts, sizes: Sizes, planes: Planes
) -> tuple[Target, KVCache]:
    """The class that holds the result, and its cache.

    Args:
        recipe: What is asked for; without a target, the class of transformers if it can hold it.
        facts: The source.
        sizes: Of all layers.
        planes: For each layer the RoPE plane of each pair of the rotary key.

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
        native = deepseek_class(
            facts,
            rank=sizes.rank,
            planes=common,
            nope_dim=facts.geometry.head_dim,
            arch=recipe.arch,
            inert="epsilon" if recipe.serving else "constant",
            dtype=recipe.dtype,
            largest=None,
        )
        assert native is not None
        if recipe.serving:
            _check_serving(recipe, native, facts)
        cached = sizes.rank + _constant_dims(recipe, native=True)
        return native, _cache(recipe, facts, cached, sizes.rope_dims)
    asked = {
        "--serving": recipe.serving,
        "--target native": recipe.target == "native",
        f"--arch {recipe.arch}": recipe.arch != _DEFAULT_ARCH,
    }
    if any(asked.values()):
        asked_for = next(flag for flag, given in asked.items() if given)
        raise UsageError(
            f"{asked_for}: no latent attention of transformers holds this {name} model: {problem}",
            hint=f"Leave {asked_for} out: a class of kvpatch holds it.",
        )
    ours = _our_class(facts, sizes, planes)
    if ours is None:
        raise UsageError(
            f"no class with latent attention holds a {name} model",
            hint="Merge its KV heads instead: kvpatch gqa.",
        )
    return ours, _cache(recipe, facts, sizes.rank, sizes.rope_dims)


def _our_class(facts: ModelFacts, sizes: Sizes, planes: Planes) -> Target | None:
    return latent_class(
        facts,
        ranks=[sizes.rank] * facts.layers,
        planes=planes,
        nope_dim=facts.geometry.head_dim,
        value_dim=facts.geometry.value_dim,
        kv_source_layers=None,
    )


def _check_serving(recipe: MlaRecipe, target: Target, facts: ModelFacts) -> None:
    if recipe.rope_select != "stride":  # what others choose depends on the weights
        raise UsageError(
            f"--serving: --rope-select {recipe.rope_select} chooses rotary frequencies that are on "
            "no common base, and servers know no others",
            hint="Give --rope-select stride, or leave --serving out.",
        )
    if BLOCKS[facts.family.model_type].query_bias(stock_config(facts)):
        raise UsageError(
            f"--serving: the attention of this {facts.family.model_type} model has biases, which "
            "servers of DeepSeek models ignore",
            hint="Leave --serving out.",
        )
    problems = serving_problems(target.edit(facts.config))
    if problems:
        raise UsageError(
            "--serving: servers would not load the result as it should be: " + "; ".join(problems),
            hint="Give --kv-budget 512+64 or 256+64, or leave --serving out.",
        )


def _cache(recipe: MlaRecipe, facts: ModelFacts, rank: int, rope: int) -> KVCache:
    return latent_cache(
        layers=facts.layers,
        rank=rank,
        rope_dim=rope,
        scales=facts.key_scales,
        windows=facts.windows if facts.family.windows.cached else None,
        bytes_per_value=facts.bytes_per_value(recipe.dtype),
    )

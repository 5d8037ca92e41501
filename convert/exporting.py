"""Results with latents written in another form, without changing what they compute.

An export is a conversion whose layers are latent already (``convert/latent_source.py``); its
targets are those of ``mla``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.staging import MANIFEST
from convert.facts import ModelFacts
from convert.invocation import command_of
from convert.latent_sizes import Sizes
from convert.latent_source import LatentSource
from convert.layer import LatentLayer
from convert.methods import Converted, Method
from convert.opening import OpenModel
from convert.recipe import ExportRecipe
from convert.scheme import Scheme
from convert.steps import Step
from convert.targets import Target
from convert.targets.deepseek import deepseek_class, deepseek_problem
from convert.targets.deepseek_read import norm_error, norm_inputs
from convert.targets.latent import latent_class
from convert.targets.serving import serving_problems
from kvpatch.errors import InputModelError, UsageError
from kvpatch.memory import latent_cache

__all__ = ["Export", "examined", "export_of", "export_unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be done with a source.

    Args:
        source: The source.
        scheme: What is done.
        errors: For each layer the share of a latent that taking its norm for a constant may
            neglect, 0 where there is none; nothing before weights were read.
        earlier: Manifest of the source; None if it was saved without.
    """

    source: LatentSource
    scheme: Scheme
    errors: tuple[float, ...]
    earlier: Mapping[str, Any] | None


def export_of(recipe: ExportRecipe, model: OpenModel) -> Export:
    """What a recipe does to a model, as far as its headers tell; ``examined`` knows the rest.

    Raises:
        UsageError: If no class holds the result, or it has the form that is asked for.
        InputModelError: If the model has no latents.
    """
    source, checkpoint = model.latents, model.checkpoint
    if source is None:
        raise InputModelError(
            f"{checkpoint.config.get('model_type')} has no latents; only results of kvpatch mla "
            "are exported",
            hint="Convert it: kvpatch mla.",
        )
    earlier = _earlier(checkpoint.root)
    if recipe.target == "native":
        _refuse_native(source, recipe)
    elif source.stock is None:
        raise UsageError(
            f"this model is a {source.architecture} already", hint="Give --target native."
        )
    target, cached_rank = _target(source, recipe, query_bias=True)
    facts = source.facts
    scheme = Scheme(
        recipe=recipe,
        method=Method(
            reads=frozenset(),
            tensors=tuple(source.shapes),
            outline=partial(_outline, source=source),
            convert=None,
            working_bytes=lambda largest: 32 * largest,  # the layer and its rewrites in float64
        ),
        target=target,
        kv_heads=None,
        sources=tuple(range(facts.layers)),
        before=source.cache,
        sizes=(Sizes(source.geometry.rank, source.geometry.rope_dim),) * facts.layers,
        cache=latent_cache(
            layers=facts.layers,
            rank=cached_rank,
            rope_dim=source.geometry.rope_dim,
            bytes_per_value=facts.bytes_per_value(recipe.dtype),
        ),
        warnings=() if earlier is not None else (_UNKNOWN,),
        caveats=() if earlier is None else tuple(earlier.get("caveats", ())),
    )
    return Export(source=source, scheme=scheme, errors=(), earlier=earlier)


def examined(export: Export, recipe: ExportRecipe, checkpoint: Checkpoint) -> Export:
    """The export after a look at biases of queries and at what stands before latent norms.

    Raises:
        InputModelError: If a latent norm does more than rounding.
    """
    errors = _norm_errors(export.source, checkpoint, recipe.dtype)
    biased = _query_bias(export.source, checkpoint)
    target, _ = _target(export.source, recipe, query_bias=biased)
    return dataclasses.replace(
        export, errors=errors, scheme=dataclasses.replace(export.scheme, target=target)
    )


_UNKNOWN = (
    f"the model was saved without its {MANIFEST}: neither card nor manifest of the result will say "
    "what it was made from; copy that file, which kvpatch mla wrote, beside it"
)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None.

    Raises:
        InputModelError: If there is one that no conversion wrote.
    """
    if not (folder / MANIFEST).is_file():
        return None
    earlier = read_manifest(folder)
    if absent := {"source", "recipe", "calibration", "layers", "files"} - earlier.keys():
        raise InputModelError(
            f"{folder / MANIFEST} has no {', '.join(sorted(absent))}", hint="Remove or restore it."
        )
    return earlier


def _refuse_native(source: LatentSource, recipe: ExportRecipe) -> None:
    # planes of the first layer tell nothing of the others where layers differ
    whole = deepseek_problem(source.facts, [0]) or source.problem
    problem = whole or deepseek_problem(source.facts, source.planes)
    if problem is not None:
        raise UsageError(
            f"--target native: no latent attention of transformers holds this "
            f"{source.architecture}: {problem}",
            hint="What kvpatch mla --target native writes can be exported to kvpatch and back.",
        )


def _norm_errors(
    source: LatentSource, checkpoint: Checkpoint, dtype: str | None
) -> tuple[float, ...]:
    """What is neglected in each layer.

    Refused where it is more than a rounding to the dtype of the source, for which its norm was
    made inert, or to the one that is written, if that rounds more.
    """
    form, own = source.stock, source.facts.dtype
    if form is None:
        return (0.0,) * source.facts.layers
    roundings = {name: torch.finfo(getattr(torch, name)).eps / 2 for name in (own, dtype or own)}
    dtype = max(roundings, key=roundings.__getitem__)
    names, most = norm_inputs(form), roundings[dtype]
    errors = []
    for layer in range(source.facts.layers):
        error = norm_error(source.tensors(checkpoint, layer, names), form)
        if not error <= most:
            raise InputModelError(
                f"layer {layer}: the latent norm changes latents by up to {error:.1e} of their "
                f"size, more than {dtype} rounds ({most:.1e}); without it the model would be "
                "another",
                hint="kvpatch export --target kvpatch writes a form without such a norm, which is "
                "to be trained instead; with a --dtype that rounds more it takes this model, too.",
            )
        errors.append(error)
    return tuple(errors)


def _query_bias(source: LatentSource, checkpoint: Checkpoint) -> bool:
    """Whether any query has a bias; training gives one to classes of kvpatch."""
    if source.stock is not None:
        return source.stock.query_rank is not None
    (name,) = (name for name in source.shapes if name.endswith("q_proj.bias"))
    return any(
        bool(source.tensors(checkpoint, layer, (name,))[name].any())
        for layer in range(source.facts.layers)
    )


def _target(source: LatentSource, recipe: ExportRecipe, *, query_bias: bool) -> tuple[Target, int]:
    """The class that is written, and the latent dims that it caches."""
    facts, g = source.facts, source.geometry
    if recipe.target == "native":
        target = deepseek_class(
            facts,
            rank=g.rank,
            planes=source.planes,
            nope_dim=g.nope_dim,
            arch=recipe.arch,
            inert="epsilon" if recipe.serving else "constant",
            dtype=recipe.dtype,
            largest=None,
            query_bias=query_bias,
        )
    else:
        target = latent_class(
            facts,
            ranks=[g.rank] * facts.layers,
            planes=[source.planes] * facts.layers,
            nope_dim=g.nope_dim,
            value_dim=g.value_dim,
            kv_source_layers=None,
        )
    assert target is not None
    # keys of the source's own class mean nothing in the result
    target = dataclasses.replace(target, edit=partial(_edit, edit=target.edit, facts=facts))
    problems = serving_problems(target.edit({})) if recipe.serving else []
    plain = recipe.model_copy(update={"serving": False})
    if problems:
        raise UsageError(
            "--serving: servers would not load the result as it should be: " + "; ".join(problems),
            hint=f"Start from kvpatch mla --serving, or leave --serving out: {command_of(plain)}",
        )
    return target, g.rank + (recipe.target == "native" and not recipe.serving)


def _edit(
    _: Mapping[str, Any],
    *,
    edit: Callable[[Mapping[str, Any]], dict[str, Any]],
    facts: ModelFacts,
) -> dict[str, Any]:
    return edit(facts.config)


def _outline(_: object, *, source: LatentSource) -> list[LatentLayer]:
    """A layer of zeros, of the sizes and dtype that the source has."""
    g, zero = source.geometry, torch.zeros((), dtype=getattr(torch, source.facts.dtype))
    width = g.nope_dim + g.rope_dim
    return [
        LatentLayer(
            geometry=g,
            q=zero.expand(g.heads, width, g.hidden),
            latent=zero.expand(g.rank, g.hidden),
            k_rope=zero.expand(g.rope_dim, g.hidden),
            k_up=zero.expand(g.heads, g.nope_dim, g.rank),
            v_up=zero.expand(g.heads, g.value_dim, g.rank),
            o=zero.expand(g.hidden, g.heads, g.value_dim),
            planes=source.planes,
            scale=source.facts.scales[0],
        )
    ]


def export_unit(step: Step, *, checkpoint: Checkpoint, export: Export) -> Converted:
    """The layer of a step, and what is known of it."""
    (number,) = step.layers
    source, geometry = export.source, export.source.geometry
    layer = source.read(source.tensors(checkpoint, number, source.reads))
    result = {
        "rank": geometry.rank,
        "rope_dims": geometry.rope_dim,
        "norm_error": export.errors[number],
    }
    return [layer], [result]

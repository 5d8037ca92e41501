"""The first half of the road, which reads no weights unless it must: source -> facts -> plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.card import inherited_metadata
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.sidecars import gathered_files, tokenizer_folder
from convert.checkpoint.staging import check_output, unfinished
from convert.choosing import choose_plan
from convert.exporting import Export, examined, export_of
from convert.facts import ModelFacts
from convert.foreseen import foreseen
from convert.hub import Source, fetched, opened_source, user_path
from convert.latent_choice import LatentChoice, choose_latents
from convert.loading import check_device
from convert.opening import OpenModel, open_model
from convert.plan import Plan, make_plan
from convert.progress import PARTS
from convert.quantities import parse_size
from convert.recipe import ClaRecipe, ExportRecipe, MlaRecipe, Recipe
from convert.resources import check_disk, check_ram
from convert.scheme import Scheme, latent_scheme, method_of, scheme_of, settled
from convert.texts import Windows, few_tokens, windows_from
from kvpatch.errors import UsageError

__all__ = ["Prepared", "Progress", "prepare"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A conversion that was planned but not begun."""

    scheme: Scheme
    source: Source
    checkpoint: Checkpoint
    plan: Plan
    windows: Windows | None
    latents: LatentChoice | None
    export: Export | None
    side_files: dict[str, Path]
    metadata: dict[str, Any]
    warnings: list[str]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with every choice made."""
        return self.scheme.recipe


@contextmanager
def prepare(
    recipe: Recipe, *, to_write: bool = False, progress: Progress | None = None
) -> Iterator[Prepared]:
    """Open the source of a recipe and plan its conversion.

    All that can be refused without weights is refused from the headers alone; weights on the Hub
    stay there until then, and for good if nothing follows that reads them.

    Args:
        recipe: What to convert, how and where to.
        to_write: The conversion follows: check its output first, and make all choices.
        progress: Called with what is being done, how much of it just was, and how much it is.

    Raises:
        KvpatchError: For everything that is wrong with recipe or source.
    """
    pickle = recipe.allow_pickle
    with ExitStack() as stack:
        found = opened_source(
            recipe.source, revision=recipe.revision, allow_pickle=pickle, whole=False
        )
        source = stack.enter_context(found)
        if to_write:
            _check_output(recipe, source)
        model = stack.enter_context(_opened(source, recipe))
        if model.merged:
            recipe = recipe.model_copy(update={"adapter": "merge"})
        recipe, scheme, export = _foreseen(recipe, model, largest=not to_write)
        windows, latents = _windows(recipe, source, model), None
        plan = _plan(recipe, model, scheme, windows)
        if to_write:
            _check_room(plan, recipe)
        if to_write or not recipe.planned_from_headers:
            if not source.whole:
                source = fetched(source)
                _check_output(recipe, source)
                # weights tell what headers do not, such as whether two embeddings are equal
                model = stack.enter_context(_opened(source, recipe))
                recipe, scheme, export = _foreseen(recipe, model, largest=not to_write)
            tokens = None if windows is None else windows.tokens
            scheme, latents, export = _chosen(
                recipe, model, scheme, export=export, tokens=tokens, progress=progress
            )
            plan = _plan(recipe, model, scheme, windows)
        warnings = [*model.warnings, *scheme.warnings, *scheme.caveats]
        metadata: dict[str, Any] = {}
        try:
            cards = [inherited_metadata(folder) for folder in source.folders]
            metadata = {key: value for card in cards for key, value in card.items()}
        except ValueError as error:
            warnings.append(f"no licence or language is taken over: {error}")
        if windows is not None:
            warnings += windows.warnings
            if getattr(recipe, "refit", None) != "none":
                warnings += few_tokens(windows, model.facts.geometry.hidden)
        yield Prepared(
            scheme=scheme,
            source=source,
            checkpoint=model.checkpoint,
            plan=plan,
            windows=windows,
            latents=latents,
            export=export,
            side_files=gathered_files(source.folders),
            metadata=metadata,
            warnings=warnings,
        )


def _check_room(plan: Plan, recipe: Recipe) -> None:
    """Refuse what is too large before weights are read; an unfinished run may hold a part of it."""
    check_ram(plan.peak_ram, parse_size(recipe.max_ram) if recipe.max_ram else None)
    if recipe.output is not None:
        out = user_path(recipe.output)
        shards = (path for folder in unfinished(out) for path in folder.glob("*.safetensors"))
        done = sum(path.stat().st_size for path in shards)
        check_disk(plan.output_bytes - done, out.absolute().parent)


def _check_output(recipe: Recipe, source: Source) -> None:
    if recipe.output is not None:
        for folder in source.folders:
            check_output(user_path(recipe.output), folder, overwrite=recipe.overwrite)


@contextmanager
def _opened(source: Source, recipe: Recipe) -> Iterator[OpenModel]:
    with open_model(
        source,
        adapter=recipe.adapter,
        latents=isinstance(recipe, ExportRecipe),
        allow_pickle=recipe.allow_pickle,
    ) as model:
        if recipe.adapter == "merge" and not model.merged:
            raise UsageError(f"--adapter merge: there is no adapter in {source.name}")
        yield model


def _foreseen(
    recipe: Recipe, model: OpenModel, *, largest: bool
) -> tuple[Recipe, Scheme, Export | None]:
    """The recipe with its open choices made, and what it will do, from the headers alone."""
    if isinstance(recipe, ExportRecipe):
        export = export_of(recipe, model)
        return recipe, export.scheme, export
    recipe = settled(recipe, model.facts)
    return recipe, foreseen(recipe, model.facts, largest=largest), None


def _plan(recipe: Recipe, model: OpenModel, scheme: Scheme, windows: Windows | None) -> Plan:
    identity = dict(scheme.result_keys)
    if windows is not None:
        identity["tokens"] = windows.tokens_sha256
    return make_plan(
        model.checkpoint,
        model.facts if model.latents is None else model.latents.plan_facts,
        scheme,
        dtype=recipe.dtype,
        max_shard_bytes=parse_size(recipe.max_shard_size),
        windows=None if windows is None else (len(windows.tokens), windows.tokens.shape[1]),
        identity=identity,
        left_out=(*model.buffers, *model.left_out),
        imported=model.imported,
    )


def _chosen(
    recipe: Recipe,
    model: OpenModel,
    scheme: Scheme,
    *,
    export: Export | None,
    tokens: Tensor | None,
    progress: Progress | None,
) -> tuple[Scheme, LatentChoice | None, Export | None]:
    """What a conversion does, after all choices; with latents, how those were made."""
    checkpoint, facts = model.checkpoint, model.facts
    if isinstance(recipe, ExportRecipe):
        assert export is not None
        export = examined(export, recipe, checkpoint)
        return export.scheme, None, export
    if isinstance(recipe, MlaRecipe):
        sizes, latents = choose_latents(
            recipe,
            facts,
            checkpoint,
            splits=scheme.splits,
            sources=scheme.sources,
            tokens=tokens,
            progress=_looking(facts, progress),
        )
        chosen = latent_scheme(recipe, facts, sizes, latents.planes, scheme.sources)
        return chosen, latents, None
    if isinstance(recipe, ClaRecipe) and recipe.layers == "auto":
        method, share, device = method_of(recipe), recipe.share, recipe.device
        sources = choose_plan(
            checkpoint,
            facts,
            method,
            share=share,
            tokens=tokens,
            device=device,
            progress=_looking(facts, progress),
        )
        return scheme_of(recipe, facts, sources), None, None
    return scheme, None, None


def _looking(facts: ModelFacts, progress: Progress | None) -> Callable[[int], None]:
    total = PARTS * facts.layers
    return lambda n: progress("looking", n, total) if progress else None


def _windows(recipe: Recipe, source: Source, model: OpenModel) -> Windows | None:
    if isinstance(recipe, ExportRecipe) or recipe.calibration is None:
        return None
    check_device(recipe.device)
    assert recipe.context is not None
    return windows_from(
        tokenizer_folder(source.folders),
        user_path(recipe.calibration),
        rows=model.rows,
        samples=recipe.samples,
        context=recipe.context,
        seed=recipe.seed,
    )

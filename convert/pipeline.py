"""The one road: source -> facts -> plan -> calibrate -> convert -> side files -> publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.calibrate import Calibration
from convert.calibrate_latent import LatentConverting, latent_unit
from convert.card import inherited_metadata, render_card
from convert.checkpoint.index import INDEX, index_json
from convert.checkpoint.manifest import encode_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.checkpoint.sidecars import gathered_files, tokenizer_folder
from convert.checkpoint.staging import MANIFEST, Staging, check_output, unfinished
from convert.checkpoint.writer import FileRecord, copy_file, write_file
from convert.choosing import choose_plan
from convert.execute import execute
from convert.exporting import Export, examined, export_of, export_unit
from convert.facts import has_latents, read_facts
from convert.foreseen import foreseen
from convert.hub import Source, fetched, opened_source, user_path
from convert.latent_choice import LatentChoice, choose_latents
from convert.loading import check_device
from convert.methods import Converted
from convert.opening import OpenModel, open_model
from convert.plan import Plan, make_plan
from convert.quantities import parse_size
from convert.recipe import ClaRecipe, ExportRecipe, MlaRecipe, Recipe
from convert.record import manifest_of
from convert.resources import check_disk, check_ram
from convert.scheme import Scheme, latent_scheme, method_of, scheme_of, settled
from convert.signals import sigterm_unwinds
from convert.steps import Step
from convert.streams import Converting
from convert.targets.native import config_json, with_dtype
from convert.texts import Windows, few_tokens, windows_from
from kvpatch.errors import KvpatchError, UsageError, VerificationError
from kvpatch.models import source_files

__all__ = ["Prepared", "convert", "obstacles", "prepare"]

Progress = Callable[[str, int, int], None]
_CONFIG, _CARD = "config.json", "README.md"


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
            warnings += [*windows.warnings, *few_tokens(windows, model.facts.geometry.hidden)]
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
            progress=lambda n: progress("looking", n, facts.layers) if progress else None,
        )
        chosen = latent_scheme(recipe, facts, sizes, latents.planes, scheme.sources)
        return chosen, latents, None
    if isinstance(recipe, ClaRecipe) and recipe.layers == "auto":
        method, share, device = method_of(recipe), recipe.share, recipe.device
        sources = choose_plan(checkpoint, facts, method, share=share, tokens=tokens, device=device)
        return scheme_of(recipe, facts, sources), None, None
    return scheme, None, None


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


def convert(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Convert a checkpoint; afterwards the output is complete, or as it was before.

    Args:
        recipe: What to convert, how and where to.
        progress: Called with what is being done, how much of it just was, and how much it is.
        warn: Called with each warning.

    Returns:
        The output folder.

    Raises:
        KvpatchError: For everything that a user can cause or mend.
        KeyboardInterrupt: On SIGINT, and ``Terminated`` on SIGTERM; finished shards are kept.
    """
    if recipe.output is None:
        raise UsageError("no output folder is given")
    out = user_path(recipe.output)
    with sigterm_unwinds(), prepare(recipe, to_write=True, progress=progress) as prepared:
        plan = prepared.plan
        check_ram(plan.peak_ram, parse_size(recipe.max_ram) if recipe.max_ram else None)
        with Staging(
            out, plan.plan_id, resume=recipe.resume, overwrite=recipe.overwrite
        ) as staging:
            for warning in prepared.warnings + [
                f"{path} is unfinished work of another conversion; delete it if it is not wanted"
                for path in staging.leftovers
            ]:
                if warn is not None:
                    warn(warning)
            done = sum(record.size for record, _ in staging.finished.values())
            check_disk(plan.output_bytes - done, out.absolute().parent)
            calibration = _calibrate(prepared, staging, progress)
            total = plan.output_bytes
            sources = execute(
                plan,
                prepared.checkpoint,
                staging,
                converted=_converted(prepared, calibration),
                allow_nonfinite=recipe.allow_nonfinite,
                progress=lambda n: progress("converting", n, total) if progress else None,
            )
            similarity = calibration.similarity() if calibration is not None else None
            _write_small_files(prepared, staging, sources, similarity)
            _check_staged(plan, staging.path)
            staging.publish()
    return out


def _check_room(plan: Plan, recipe: Recipe) -> None:
    """Refuse what is too large before weights are read; an unfinished run may hold a part of it."""
    check_ram(plan.peak_ram, parse_size(recipe.max_ram) if recipe.max_ram else None)
    if recipe.output is not None:
        out = user_path(recipe.output)
        shards = (path for folder in unfinished(out) for path in folder.glob("*.safetensors"))
        done = sum(path.stat().st_size for path in shards)
        check_disk(plan.output_bytes - done, out.absolute().parent)


def obstacles(prepared: Prepared) -> list[str]:
    """What would stop the run that was planned: its output path, or too little memory."""
    recipe, found = prepared.recipe, []
    limit = parse_size(recipe.max_ram) if recipe.max_ram else None
    checks: list[Callable[[], None]] = [lambda: check_ram(prepared.plan.peak_ram, limit)]
    if recipe.output is not None:
        out = user_path(recipe.output)
        checks.append(lambda: check_output(out, prepared.source.path, overwrite=recipe.overwrite))
    for check in checks:
        try:
            check()
        except KvpatchError as error:
            found.append(f"the run would stop: {error.message}")
    return found


def _calibrate(
    prepared: Prepared, staging: Staging, progress: Progress | None
) -> Converting | None:
    """Convert all layers with the calibration text, if there is one."""
    recipe = prepared.recipe
    if prepared.windows is None or isinstance(recipe, ExportRecipe) or recipe.refit is None:
        return None
    common: dict[str, Any] = {
        "plan": prepared.plan,
        "checkpoint": prepared.checkpoint,
        "scratch": Scratch(staging.scratch),
        "tokens": prepared.windows.tokens,
        "refit_scores": recipe.refit in {"q", "qo"},
        "refit_output": recipe.refit in {"o", "qo"},
        "seed": recipe.seed,
        "device": recipe.device,
    }
    calibration: Converting = (
        Calibration(**common)
        if prepared.latents is None
        else LatentConverting(**common, choice=prepared.latents)
    )
    layers = prepared.plan.facts.layers
    calibration.run(lambda n: progress("calibrating", n, layers) if progress else None)
    return calibration


def _converted(
    prepared: Prepared, calibration: Converting | None
) -> Callable[[Step], Converted] | None:
    """What gives the engine its converted layers, if not the method alone."""
    if calibration is not None:
        return lambda step: calibration.unit(step.layers)
    if prepared.export is not None:
        return partial(export_unit, checkpoint=prepared.checkpoint, export=prepared.export)
    if prepared.latents is None:
        return None
    return partial(
        latent_unit,
        plan=prepared.plan,
        checkpoint=prepared.checkpoint,
        choice=prepared.latents,
    )


def _write_small_files(
    prepared: Prepared,
    staging: Staging,
    sources: dict[str, FileRecord],
    similarity: list[list[float]] | None,
) -> None:
    """Side files, config, index, card and manifest, in this order."""
    plan, recipe, folder = prepared.plan, prepared.recipe, staging.path
    files = {file: record for file, (record, _) in staging.finished.items()}
    for name, origin in prepared.side_files.items():
        files[name] = copy_file(guarded_path(origin, name), folder / name)
    target = plan.target
    config = with_dtype(target.edit(prepared.checkpoint.config), recipe.dtype)
    files[_CONFIG] = write_file(folder / _CONFIG, config_json(config))
    if target.name == "kvpatch":
        for path in source_files():
            files[path.name] = copy_file(path, folder / path.name)
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        index = index_json(weight_map, parameters=plan.parameters, size=plan.output_bytes)
        files[INDEX] = write_file(folder / INDEX, index)
    manifest = manifest_of(prepared, staging, sources)
    if similarity is not None:
        manifest["similarity"] = similarity
    card = render_card(manifest)
    files[_CARD] = write_file(folder / _CARD, card)
    write_file(folder / MANIFEST, encode_manifest(manifest, files))


def _check_staged(plan: Plan, folder: Path) -> None:
    """Reopen what was written with the strict reader and hold it against the plan.

    Raises:
        VerificationError: If a tensor is not where and what the plan says.
    """
    planned = {
        spec.name: (spec.dtype, spec.shape, shard.file)
        for shard in plan.shards
        for spec in shard.tensors
    }
    with Checkpoint(folder) as written:
        found = {
            info.name: (info.dtype, info.shape, info.file) for info in written.tensors.values()
        }
        if not has_latents(written.config):  # no row of the family table describes latent attention
            read_facts(written.config)
    if found != planned:
        wrong = sorted(
            name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)
        )
        raise VerificationError(f"{folder}: written tensors differ from the plan: {wrong[:5]}")

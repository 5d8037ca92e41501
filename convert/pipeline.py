"""The one road: source -> facts -> plan -> calibrate -> convert -> side files -> publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.calibrate import Calibration
from convert.calibrate_latent import LatentConverting, latent_unit
from convert.card import inherited_metadata, render_card
from convert.checkpoint.manifest import encode_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.checkpoint.sidecars import side_files
from convert.checkpoint.staging import MANIFEST, Staging, check_output
from convert.checkpoint.writer import FileRecord, copy_file, write_file
from convert.choosing import choose_plan
from convert.execute import execute
from convert.exporting import Export, export_of, export_unit
from convert.facts import ModelFacts, has_latents, read_facts, with_stored_dtype, with_stored_names
from convert.hub import Source, opened_source, user_path
from convert.latent_choice import LatentChoice, choose_latents
from convert.loading import check_device
from convert.methods import Converted
from convert.plan import Plan, make_plan
from convert.progress import PARTS
from convert.quantities import parse_size
from convert.recipe import ClaRecipe, ExportRecipe, MlaRecipe, Recipe
from convert.record import manifest_of
from convert.resources import check_disk, check_ram
from convert.scheme import Scheme, latent_scheme, method_of, scheme_of, settled
from convert.sharing import parse_layers, uniform_plan
from convert.signals import sigterm_unwinds
from convert.steps import Step
from convert.streams import Converting
from convert.targets.native import config_json, index_json, with_dtype
from convert.texts import Windows, few_tokens, windows_from
from kvpatch.errors import KvpatchError, UsageError, VerificationError
from kvpatch.models import source_files

__all__ = ["Prepared", "convert", "obstacles", "prepare"]

Progress = Callable[[str, int, int], None]
_INDEX = "model.safetensors.index.json"
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
    side_files: list[str]
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

    Reads headers only, unless something is to be chosen by what it loses: layers that share, or a
    split of a budget. If nothing is and no conversion follows, weights on the Hub stay there.

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
            recipe.source,
            revision=recipe.revision,
            allow_pickle=pickle,
            whole=to_write or not recipe.planned_from_headers,
        )
        source = stack.enter_context(found)
        if to_write and recipe.output is not None:
            check_output(user_path(recipe.output), source.path, overwrite=recipe.overwrite)
        opened = Checkpoint(source.path, allow_pickle=pickle, sizes=source.sizes)
        checkpoint = stack.enter_context(opened)
        export = export_of(recipe, checkpoint) if isinstance(recipe, ExportRecipe) else None
        facts = _facts(checkpoint) if export is None else export.source.plan_facts
        recipe = settled(recipe, facts)
        windows = _windows(recipe, source)
        scheme, latents = _chosen(
            recipe, facts, checkpoint, export, windows, to_write=to_write, progress=progress
        )
        warnings = [*checkpoint.warnings, *scheme.warnings]
        metadata: dict[str, Any] = {}
        try:
            metadata = inherited_metadata(source.path)
        except ValueError as error:
            warnings.append(f"no licence or language is taken over: {error}")
        if windows is not None:
            warnings += few_tokens(windows, facts.geometry.hidden)
        identity = dict(scheme.result_keys)
        if windows is not None:
            identity["tokens"] = windows.tokens_sha256
        plan = make_plan(
            checkpoint,
            facts,
            scheme,
            dtype=recipe.dtype,
            max_shard_bytes=parse_size(recipe.max_shard_size),
            windows=None if windows is None else (len(windows.tokens), windows.tokens.shape[1]),
            identity=identity,
        )
        yield Prepared(
            scheme=scheme,
            source=source,
            checkpoint=checkpoint,
            plan=plan,
            windows=windows,
            latents=latents,
            export=export,
            side_files=side_files(source.path),
            metadata=metadata,
            warnings=warnings,
        )


def _chosen(
    recipe: Recipe,
    facts: ModelFacts,
    checkpoint: Checkpoint,
    export: Export | None,
    windows: Windows | None,
    *,
    to_write: bool,
    progress: Progress | None,
) -> tuple[Scheme, LatentChoice | None]:
    """What a conversion does, after all choices; with latents, how those were made."""
    if isinstance(recipe, ExportRecipe):
        assert export is not None
        return export.scheme, None
    sources = _sources(recipe, facts, checkpoint, windows, _looking(facts, progress))
    if not isinstance(recipe, MlaRecipe):
        return scheme_of(recipe, facts, sources), None
    sizes, planes, latents = choose_latents(
        recipe,
        facts,
        checkpoint,
        sources=sources,
        tokens=None if windows is None else windows.tokens,
        to_write=to_write,
        progress=_looking(facts, progress),
    )
    return latent_scheme(recipe, facts, sizes, planes, sources), latents


def _looking(facts: ModelFacts, progress: Progress | None) -> Callable[[int], None]:
    total = PARTS * facts.layers
    return lambda n: progress("looking", n, total) if progress else None


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    facts = with_stored_dtype(read_facts(checkpoint.config), dtypes)
    return with_stored_names(facts, checkpoint.tensors)


def _windows(recipe: Recipe, source: Source) -> Windows | None:
    if isinstance(recipe, ExportRecipe) or recipe.calibration is None:
        return None
    check_device(recipe.device)
    assert recipe.context is not None
    return windows_from(
        source.path,
        user_path(recipe.calibration),
        samples=recipe.samples,
        context=recipe.context,
        seed=recipe.seed,
    )


def _sources(
    recipe: Recipe,
    facts: ModelFacts,
    checkpoint: Checkpoint,
    windows: Windows | None,
    progress: Callable[[int], None],
) -> Sequence[int]:
    """For each layer the one whose keys and values it reads afterwards."""
    if not isinstance(recipe, ClaRecipe | MlaRecipe) or recipe.share is None:
        return range(facts.layers)
    assert recipe.layers is not None
    auto = isinstance(recipe, ClaRecipe)  # which knows it
    if not isinstance(recipe, ClaRecipe) or recipe.layers != "auto":
        span = parse_layers(recipe.layers, facts.layers, auto=auto)
        return uniform_plan(facts, recipe.share, *span, auto=auto)
    return choose_plan(
        checkpoint,
        facts,
        method_of(recipe),
        share=recipe.share,
        tokens=None if windows is None else windows.tokens,
        device=recipe.device,
        progress=progress,
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
    total = PARTS * prepared.plan.facts.layers
    calibration.run(lambda n: progress("calibrating", n, total) if progress else None)
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
    for name in prepared.side_files:
        files[name] = copy_file(guarded_path(prepared.source.path, name), folder / name)
    target = plan.target
    config = with_dtype(target.edit(prepared.checkpoint.config), recipe.dtype)
    files[_CONFIG] = write_file(folder / _CONFIG, config_json(config))
    if target.name == "kvpatch":
        for path in source_files():
            files[path.name] = copy_file(path, folder / path.name)
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        index = index_json(weight_map, parameters=plan.parameters, size=plan.output_bytes)
        files[_INDEX] = write_file(folder / _INDEX, index)
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
